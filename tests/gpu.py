"""On a GPU every strategy does with every family what it does on a CPU, and waits for the device no more often.

    pytest tests/gpu.py

Without a GPU on one that is pretended, where Triton's kernels are interpreted if `TRITON_INTERPRET=1`.
"""

from __future__ import annotations

import copy
import json
import shlex
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor

import vtc
from combinations import Case
from families import FAMILIES, GREEDY, LAYERS, ONE_IMAGE, TWO_IMAGES, Batch, Family
from oracle import CLOSE, error
from pretend import pretended
from vtc import cli
from vtc.compressor import parse
from vtc.kernels.dispatch import fused
from watch import Watch

REAL = torch.cuda.is_available()
SIZES = {"image_sizes", "batch_num_images", "image_grid_thw", "video_grid_thw"}  # which models read many times


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with nullcontext() if REAL else pretended(), torch.no_grad():
        yield


@cache
def there(family: Family, attention: str) -> Any:
    return copy.deepcopy(family.model(attention)).to("cuda")


def moved(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to("cuda") for name, x in inputs.items()}


def close(family: Family, attention: str, prompts: Batch) -> float:
    """Relative error that is rounding, which the model itself does differently on a GPU."""
    expected, model = family.model(attention)(**prompts.inputs()).logits, there(family, attention)
    return max(CLOSE[torch.float32], 2 * error(model(**moved(prompts.inputs())).logits.cpu(), expected))


def waits(call: Callable[[], object]) -> int:
    """How often host and device wait for each other."""
    if not REAL:
        with Watch() as seen:
            call()
        return sum(name != "lift_fresh" for name in seen.waits)  # whose upload, if there is one, is a copy here
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in said)


def test_kernels_are_chosen() -> None:
    assert fused(torch.zeros(1, device="cuda"))


def test_law_2_on_a_gpu(any_case: Case) -> None:
    """What survives and what is said is the same as on a CPU; in single precision, in which few scores tie."""
    case = replace(any_case, dtype=torch.float32)
    prompts = case.batch()
    with vtc.compress(case.model(), case.specs) as here:
        expected = case.model()(**prompts.inputs()).logits
    model = there(case.family, case.attention)
    with vtc.compress(model, case.specs) as run:
        logits = model(**moved(prompts.inputs())).logits
    assert logits.device.type == "cuda" and error(logits.cpu(), expected) < close(case.family, case.attention, prompts)
    assert (run.last is None and here.last is None) or run.last.kept == here.last.kept


def test_law_10_on_a_gpu(case: Case) -> None:
    """No more waits than on a CPU, and one for each list of sizes, which is read before the encoder starts."""
    case = replace(case, dtype=torch.float32)
    if any(parse(spec).adaptive for spec in case.specs):
        return
    model, prompts = there(case.family, case.attention), case.batch()
    inputs = moved(prompts.inputs())
    if len(prompts.rows) == 1:
        del inputs["attention_mask"]
    plain = waits(lambda: model(**inputs))
    with vtc.compress(model, case.specs):
        model(**inputs)  # the first selection of a session is validated, which reads
        compressed = waits(lambda: model(**inputs))
    joins = case.family.name == "internvl" and len(prompts.visuals()) > 0
    allowed = len(SIZES & set(inputs)) + int(len(prompts.rows) > 1 or joins) + case.zeros
    assert compressed <= plain + allowed


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(
    "spec", ["divprune:keep=4", "todre:keep=6,pivot=received+fastv:keep=4,layer=2"], ids=["input", "decoder"]
)
def test_generating(spec: str, family: Family) -> None:
    prompts: Batch = family.batch([TWO_IMAGES, ONE_IMAGE])
    specs = spec.split("+")
    with vtc.compress(family.model(), specs):
        expected = family.model().generate(**prompts.inputs(), **GREEDY)
    with vtc.compress(there(family, "sdpa"), specs):
        out = there(family, "sdpa").generate(**moved(prompts.inputs()), **GREEDY)
    assert torch.equal(out.sequences.cpu(), expected.sequences)
    assert error(torch.stack(out.logits).cpu(), torch.stack(expected.logits)) < close(family, "sdpa", prompts)


def spread(model: Any) -> Any:
    """Half of the decoder layers, and what follows, on a second GPU: what accelerate does for large models."""
    blocks = [f"model.language_model.layers.{layer}" for layer in range(LAYERS // 2, LAYERS)]
    blocks += ["model.language_model.norm", "lm_head"]
    places = dict.fromkeys(blocks, "cuda:1")
    for name, parameter in model.named_parameters():
        owner, _, own = name.rpartition(".")
        if any(block.startswith(f"{owner}.") for block in blocks):  # itself on the first, modules in it on the second
            places[name] = "cuda:0"
            setattr(model.get_submodule(owner), own, torch.nn.Parameter(parameter.to("cuda:0")))
        elif not any(name.startswith(f"{block}.") for block in blocks):
            places[owner] = "cuda:0"
    for name, _ in model.named_buffers():  # frequencies, which some releases of transformers leave where they are
        if not any(name.startswith(f"{block}.") for block in blocks):
            places.setdefault(name.rpartition(".")[0], "cuda:0")
    return accelerate.dispatch_model(model, places, main_device="cuda:0")


@pytest.mark.skipif(REAL and torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("spec", ["divprune:keep=4", "fastv:keep=4,layer=2"])
def test_two_gpus(spec: str, family: Family) -> None:
    prompts = family.batch([TWO_IMAGES, ONE_IMAGE])
    with vtc.compress(family.model(), spec) as here:
        expected = family.model().generate(**prompts.inputs(), **GREEDY)
    placed = spread(copy.deepcopy(family.model()))
    with vtc.compress(placed, spec) as run:
        out = placed.generate(**moved(prompts.inputs()), **GREEDY)
    assert torch.equal(out.sequences.cpu(), expected.sequences)
    assert run.last is not None and here.last is not None and run.last.kept == here.last.kept


def test_vtc_bench(tmp_path: Path) -> None:
    """Times by events of the device, and peak memory."""
    given = shlex.split(
        "bench --model tiny-llava --spec divprune --keep 0.25 --limit 1 --repeats 2 --device cuda --out"
    )
    assert cli.main([*given, str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    timed = [row for row in rows if row["ttft_ms"] is not None]
    assert {"none", "divprune"} <= {row["strategy"] for row in timed}
    assert all(row["ttft_ms"] > 0 < row["peak_memory_bytes"] and "CPU" not in row["device"] for row in timed)
