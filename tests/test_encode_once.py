"""Questions that share their pictures and clips: the encoder sees each of them once, and no answer changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import vtc
from families import FAMILIES, GREEDY, NEWEST, SHAPES, Batch, Family, Row
from vtc import adapters
from vtc.eval.accuracy import encode_once

SPECS = [None, "fastervlm:saliency=received,keep=5", "divprune:keep=0.3", "pool:keep=0.4", "fastv:layer=3,keep=0.5"]
PICTURES = (7, 3, 7, 7)  # which are shown by the four questions


def asked(family: Family, shape: str) -> Batch:
    """Questions about the same visual inputs, and one about others of the same sizes."""
    first, other = (family.batch([SHAPES[shape][0]], seed).rows[0] for seed in (0, 1))
    rows = []
    for number, row in enumerate((first, other, first, first)):
        ids = row.ids.clone()
        ids[-1] = 40 + number
        rows.append(replace(row, ids=ids))
    return Batch(family, tuple(rows))


@pytest.mark.skipif(not NEWEST, reason="this transformers release does not run the encoder ahead of the prefill")
@pytest.mark.parametrize("shape", ["image", "two-images", "clip", "image-and-clip"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_no_answer_changes_and_less_is_encoded(name: str, shape: str) -> None:
    family = FAMILIES[name]
    if shape not in family.shapes:
        pytest.skip("this family takes no clips")
    inputs, model = asked(family, shape).inputs(), family.model()
    seen: list[int] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append(next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value)).shape[0])

    for spec in SPECS:
        with (
            adapters.find(model).encoder.register_forward_hook(look, with_kwargs=True),
            vtc.compress(model, spec or "none") as run,
        ):
            expected, report = model.generate(**inputs, **GREEDY), run.last
            before = sum(seen)
            seen.clear()
            found = model.generate(**encode_once(model, dict(inputs), PICTURES), **GREEDY)
            assert 2 * sum(seen) == before
            seen.clear()
            torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
            assert torch.equal(found.sequences, expected.sequences)
            assert run.last.kept == report.kept and run.last.layouts == report.layouts


def test_questions_about_different_pictures_are_left_alone() -> None:
    family = FAMILIES["llava"]
    inputs = Batch(family, tuple(Row(row.ids, row.shown) for row in asked(family, "image").rows[:2])).inputs()
    assert encode_once(family.model(), inputs, (0, 1)) is inputs
