"""What a call did to each of its prompts, from its report."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vtc
from families import FAMILIES
from vtc import adapters
from vtc.eval import page
from vtc.eval.survivors import layout_of, owners, survivors


def called(name: str, shape: str, spec: str) -> tuple[Any, Any, dict[str, list[int]]]:
    """The report of one call, its batch, and the visual tokens of each row by modality."""
    family = FAMILIES[name]
    model, batch = family.model(), family.batch(family.shapes[shape])
    inputs = batch.inputs()
    with vtc.compress(model, spec) as session, torch.no_grad():
        model(**inputs)
    masks = adapters.find(model).placeholders(inputs["input_ids"], None)
    return session.last, batch, {kind: mask.sum(1).tolist() for kind, mask in masks.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_visual_input_belongs_to_the_prompt_that_shows_it(name: str) -> None:
    report, batch, visual = called(name, "ragged", "uniform:keep=2")
    found = owners(report, visual)
    assert sorted(number for mine in found for number in mine) == list(range(len(report.layouts)))
    for row, mine in zip(batch.rows, found, strict=True):
        told = survivors(report, mine)
        assert told["tokens_in"] == sum(shown.tokens for shown in row.shown)
        assert told["tokens_out"] == 2 * len(row.shown), "images and clips have two each, text has none"


def test_reports_of_other_prompts_are_noticed() -> None:
    report, _, visual = called("llava", "image", "uniform:keep=2")
    with pytest.raises(RuntimeError, match="the report of the images does not fit the prompts"):
        owners(report, {kind: [2 * count for count in counts] for kind, counts in visual.items()})


# To InternVL, a clip is several visual inputs.
ALONE = [
    (name, shape)
    for name, family in FAMILIES.items()
    for shape in ("image", "clip")
    if shape in family.shapes and (name, shape) != ("internvl", "clip")
]


@pytest.mark.parametrize(("name", "shape"), ALONE)
def test_layouts_come_back_from_a_file(name: str, shape: str) -> None:
    report, _, visual = called(name, shape, "pool:keep=3")
    ((number,),) = owners(report, visual)
    told = json.loads(json.dumps(survivors(report, [number])))
    layout, true = layout_of(told), report.layouts[number]
    assert layout is not None
    assert (layout.tokens, layout.views, layout.clip) == (true.tokens, true.views, true.clip)
    assert ("grid" in told) is (len(true.views) == 1 and not true.clip)
    assert told["kept"] == list(report.kept[number]) and len(told["sources"]) == true.tokens


@pytest.mark.parametrize(("name", "shape"), [("llava", "image"), ("llava-next", "image"), ("qwen2vl", "clip")])
def test_pages_draw_whatever_one_prompt_shows(name: str, shape: str) -> None:
    report, batch, _ = called(name, shape, "pool:keep=3")
    height, width = batch.rows[0].shown[0].size[:2] if shape == "image" else (40, 60)
    frames = np.zeros((6, height, width, 3), np.uint8)
    medium = Image.fromarray(frames[0]) if shape == "image" else frames
    before, after = (opened(text) for text in page._drawings(medium, survivors(report, [0])))
    assert max(after.size) == (page.SIDE if name == "llava" else page.SHEET)
    assert before.size == (medium.size if shape == "image" else after.size)
    nothing = page._drawings(medium, {"tokens_in": 16, "tokens_out": 3})
    assert nothing[1] is None and (nothing[0] is None) is (shape == "clip")


def opened(address: str | None) -> Image.Image:
    assert address is not None
    head, _, data = address.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))
