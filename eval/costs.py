"""What a setting does to one prompt: lengths, and FLOPs in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc import adapters
from vtc.eval import flops, latency
from vtc.eval.estimate import SELECTION, cut, selection, view_tokens
from vtc.eval.made_up import count
from vtc.eval.plan import Setting, named
from vtc.report import Report

HARMLESS = frozenset(
    {"keep", "positions", "seed", "layer", "stages", "truncate"}
)  # options that change no work per cut


@dataclass(frozen=True)
class Sizes:
    """Lengths and FLOPs of one prompt."""

    tokens_in: int  # visual tokens, before anything is compressed or scaled down
    tokens_out: int
    sequence_in: int  # text included
    sequence_out: int
    encoder_flops: int
    projector_flops: int
    selection_flops: int | None  # at every place where tokens leave; None where there is no closed form
    prefill_flops: int  # language model, one row of logits
    decode_flops: int  # of the first generated token
    kv_cache_bytes: int  # after the prompt


def sizes(model: Any, setting: Setting, inputs: dict[str, Tensor], tokens: int | None = None) -> Sizes:
    """Run one prompt, to see that the setting works on this model and what it does to the lengths.

    Args:
        model: not compressed.
        setting: what to do with it.
        inputs: the prompt as this setting asks it.
        tokens: visual tokens of the prompt at full size, if they are more than in `inputs`.
    """
    adapter = adapters.find(model)
    given = count(adapter, inputs)
    before, length = given if tokens is None else tokens, inputs["input_ids"].shape[1]
    with setting.on(model) as session:
        run = latency.run(model, inputs)
        report = None if session is None else session.last
    config: Any = adapter.multimodal.config
    text = adapter.text_config
    lengths = [run.length] * text.num_hidden_layers if report is None else report.lengths
    return Sizes(
        tokens_in=before,
        tokens_out=given if report is None else report.tokens_out,
        sequence_in=length + before - given,
        sequence_out=lengths[-1],
        encoder_flops=encoder_flops(config.vision_config, run.images, inputs),
        projector_flops=flops.projector_flops(config, projected(config, run.images, inputs, given)),
        selection_flops=0 if report is None else selection_flops(config, setting, report, run.images, inputs),
        prefill_flops=flops.prefill_flops(text, lengths),
        decode_flops=flops.decode_flops(text, [length + 1 for length in lengths]),
        kv_cache_bytes=flops.kv_cache_bytes(text, lengths, model.dtype),
    )


def selection_flops(config: Any, setting: Setting, report: Report, views: int, inputs: dict[str, Tensor]) -> int | None:
    """FLOPs of choosing survivors, as `vtc flops` counts them.

    `None` where a strategy has options that may change its work, or none of ours, or the prompt shows several things.
    """
    changed = {key for one in setting.compressors for key in named(str(one))} - HARMLESS
    if changed or len(report.layouts) != 1 or not all(one.name in SELECTION for one in setting.compressors):
        return None
    (layout,), vision = report.layouts, config.vision_config
    grids = [
        grid for name in ("image_grid_thw", "video_grid_thw") for grid in inputs.get(name, torch.empty(0)).tolist()
    ]
    if vision.model_type in flops.PACKED:
        looks = sum(frames * (rows * columns) ** 2 for frames, rows, columns in grids)
    else:
        looks = views * flops.per_edge(vision) ** 4
    text = inputs["input_ids"].shape[1] - layout.tokens
    frames = len(layout.views) if layout.clip else 1
    total, before = 0, layout.tokens
    for stage in report.stages:
        after = len(stage.kept[0])
        name = stage.spec.partition(":")[0]
        total += selection(name, [cut(config, before, after, text, frames, looks)]).flops if after < before else 0
        before = after
    return total


def encoder_flops(vision_config: Any, views: int, inputs: dict[str, Tensor]) -> int:
    """FLOPs of the encoder on the visual inputs of a prompt, which it sees as `views` views of one size, or packed."""
    if vision_config.model_type not in flops.PACKED:
        return flops.encoder_flops(vision_config, images=views)
    side, total = vision_config.spatial_merge_size, 0
    for name in ("image_grid_thw", "video_grid_thw"):
        for frames, rows, columns in inputs[name].tolist() if name in inputs else []:
            total += flops.encoder_flops(vision_config, grid=(frames, rows // side, columns // side))
    return total


def projected(config: Any, views: int, inputs: dict[str, Tensor], tokens: int) -> int:
    """Rows that the projector computes: most come before padding is cut off and frames are pooled."""
    pooled = config.model_type == "llava_next_video" and "pixel_values_videos" in inputs  # these only after
    return tokens if pooled or config.vision_config.model_type in flops.PACKED else views * view_tokens(config)
