"""Prompts for models without a processor, such as real architectures with random weights: noise of the right shapes.

Time, memory and FLOPs look at shapes. The shapes are what the family's processor would make of a picture or a clip; how
many tokens that gives, and where a strategy finds them, the adapter says.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc import adapters
from vtc.adapters import Adapter
from vtc.errors import VtcError
from vtc.eval import downsample
from vtc.eval.estimate import frame_tokens
from vtc.eval.flops import PACKED

TILES = 12  # of an InternVL picture at most, besides its thumbnail: the default of its processor


@dataclass(frozen=True)
class MadeUp:
    """One prompt with a picture, or with a clip if it has frames.

    Attributes:
        text: tokens that show nothing; half of them before the picture.
        frames: of a clip; `None` for a picture.
        width, height: in pixels. Encoders of fixed views bring any picture to their own size.
    """

    text: int = 64
    frames: int | None = None
    width: int = 640
    height: int = 480

    def __post_init__(self) -> None:
        for name in ("text", "frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise VtcError(f"--{name} is {value}; use at least 1")
        if min(self.width, self.height) < 1:
            raise VtcError(f"--size is {self.width}x{self.height}; use at least 1x1")

    def __str__(self) -> str:
        frames = f"{self.frames} frame{'' if self.frames == 1 else 's'}"
        shown = "picture" if self.frames is None else f"clip of {frames}"
        return f"one made-up {shown} of {self.width} x {self.height} pixels, {self.text} tokens of text"

    @torch.no_grad()
    def inputs(self, model: Any, *, scale: float = 1.0, blind: bool = False) -> dict[str, Tensor]:
        """What the model takes: one prompt without padding.

        Args:
            model: any supported one.
            scale: of the picture or the frames.
            blind: leave them out.

        Raises:
            VtcError: a clip for a model that takes none.
        """
        return {
            name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
            for name, value in self._make(model, scale, blind).items()
        }

    def tokens(self, model: Any, scale: float = 1.0) -> int:
        """Visual tokens that the model makes of it."""
        return count(adapters.find(model), self._make(model, scale, blind=False))

    def _make(self, model: Any, scale: float, blind: bool) -> dict[str, Tensor]:
        """`inputs`, not yet where the model is."""
        adapter = adapters.find(model)
        config: Any = adapter.multimodal.config
        random = torch.Generator().manual_seed(0)
        words = _words(config, random, self.text)
        width, height = downsample.size(self.width, self.height, scale)
        frames = self.frames
        if frames is not None and config.vision_config.model_type not in PACKED and not frame_tokens(config):
            raise VtcError(f"a {config.model_type} takes pictures, not clips: leave --frames out")
        shown: dict[str, Tensor] = {}
        if not blind and frames is None:
            shown = _picture(config, width, height, random)
        elif not blind and frames is not None:
            shown = _clip(config, frames, width, height, random)
        kind = "video" if "pixel_values_videos" in shown else "image"
        runs = _runs(adapter, config, kind, shown, frames is not None) if shown else []
        ids = _join(config, kind, words, runs)
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **shown}
        takes = inspect.signature(type(model).forward).parameters
        if "mm_token_type_ids" in takes:
            masks = adapter.placeholders(ids, None)
            made["mm_token_type_ids"] = sum(
                (number * masks[name].long() for number, name in ((1, "image"), (2, "video")) if name in masks),
                start=torch.zeros_like(ids),
            )
        if "batch_num_images" in takes and kind == "image" and runs:
            made["batch_num_images"] = torch.tensor([1])
        if "second_per_grid_ts" in takes and kind == "video" and runs:
            made["second_per_grid_ts"] = torch.ones(1)
        return made


def count(adapter: Adapter, inputs: dict[str, Tensor]) -> int:
    """Visual tokens of a batch."""
    return sum(int(mask.sum()) for mask in adapter.placeholders(inputs["input_ids"], None).values())


# ------------------------------------------------------------------------------------------------------------- pixels


def _picture(config: Any, width: int, height: int, random: torch.Generator) -> dict[str, Tensor]:
    vision = config.vision_config
    if vision.model_type in PACKED:
        return _packed(config, "image", 1, width, height, random)
    side = _side(config)
    if getattr(config, "image_grid_pinpoints", None):
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        views = int(image_size_to_num_patches((height, width), config.image_grid_pinpoints, side))
        sizes = torch.tensor([[height, width]])
        return {"pixel_values": torch.randn(1, views, 3, side, side, generator=random), "image_sizes": sizes}
    views = _tiles(width, height, side) if hasattr(config, "downsample_ratio") else 1
    return {"pixel_values": torch.randn(views, 3, side, side, generator=random)}


def _clip(config: Any, frames: int, width: int, height: int, random: torch.Generator) -> dict[str, Tensor]:
    if config.vision_config.model_type in PACKED:
        return _packed(config, "video", frames, width, height, random)
    side = _side(config)
    if hasattr(config, "downsample_ratio"):  # to InternVL, frames are pictures of one tile
        return {"pixel_values": torch.randn(frames, 3, side, side, generator=random)}
    return {"pixel_values_videos": torch.randn(1, frames, 3, side, side, generator=random)}


def _packed(
    config: Any, kind: str, pictures: int, width: int, height: int, random: torch.Generator
) -> dict[str, Tensor]:
    """Patches of one grid, whose edges are rounded to whole tokens."""
    vision = config.vision_config
    token = vision.patch_size * vision.spatial_merge_size
    rows, columns = (max(1, round(edge / token)) * vision.spatial_merge_size for edge in (height, width))
    grid = (math.ceil(pictures / vision.temporal_patch_size), rows, columns)
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(math.prod(grid), values, generator=random)
    return {
        "pixel_values" if kind == "image" else "pixel_values_videos": pixels,
        f"{kind}_grid_thw": torch.tensor([grid]),
    }


def _side(config: Any) -> int:
    side = config.vision_config.image_size
    return side if isinstance(side, int) else side[0]


def _tiles(width: int, height: int, side: int) -> int:
    """InternVL's rule: the grid of tiles of most nearly the picture's shape, no larger than needed, and a thumbnail."""
    grids = [(across, down) for across in range(1, TILES + 1) for down in range(1, TILES // across + 1)]
    nearest = min(abs(width / height - across / down) for across, down in grids)
    best = [(across, down) for across, down in grids if abs(width / height - across / down) == nearest]
    # Of grids of one shape, a larger one only for a picture that covers more than half of it.
    fits = [across * down for across, down in best if width * height > 0.5 * side**2 * across * down]
    tiles = max(fits, default=min(across * down for across, down in best))
    return tiles + (tiles > 1)


# -------------------------------------------------------------------------------------------------------------- tokens


def _runs(adapter: Adapter, config: Any, kind: str, shown: dict[str, Tensor], clip: bool) -> list[int]:
    """Lengths of the runs of visual tokens, which have text between them."""
    layouts = adapter.layouts(kind, shown)
    if clip and adapter.joined:  # frames are pictures
        return [layout.tokens for layout in layouts]
    if clip and config.model_type == "qwen3_vl":  # the time stands before every frame
        return [view.rows * view.columns for layout in layouts for view in layout.views]
    return [sum(layout.tokens for layout in layouts)]


def _words(config: Any, random: torch.Generator, count: int) -> Tensor:
    """`(count,)`: tokens of the vocabulary that mean nothing to the model's code."""
    names = [name for name in dir(config) if name.endswith(("token_id", "token_index"))]
    special = {getattr(config, name) for name in names if isinstance(getattr(config, name), int)}
    usual = torch.tensor([token for token in range(config.get_text_config().vocab_size) if token not in special])
    return usual[torch.randint(len(usual), (count,), generator=random)]


def _join(config: Any, kind: str, words: Tensor, runs: Sequence[int]) -> Tensor:
    """`(1, S)`: half of the text, the runs with a word between them, the rest of the text."""
    ends = [getattr(config, f"vision_{end}_token_id", None) for end in ("start", "end")]
    text, half = words.tolist(), len(words) // 2
    ids = text[:half]
    for number, length in enumerate(runs):
        inside = [ends[0], *[getattr(config, f"{kind}_token_id")] * length, ends[1]]
        ids += [*(text[:1] if number else []), *(token for token in inside if token is not None)]
    return torch.tensor([[*ids, *text[half:]]])
