"""Qwen2.5-VL: most layers of its encoder attend within windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from vtc.adapters.base import Attention
from vtc.adapters.qwen2vl.qwen2vl import Qwen2VLAdapter
from vtc.errors import UnsupportedModelError
from vtc.visual import Layout


class Qwen2_5VLAdapter(Qwen2VLAdapter):
    """`Qwen2_5_VLModel` of transformers, as in `Qwen2_5_VLForConditionalGeneration`.

    In a few layers patches attend within their whole frame. In all others they attend within a window, and scores of
    different windows cannot be compared, so no saliency is read there. `encoder_info.feature_layer`, at which
    strategies look by default, is the last of the few; in the published models this is the last layer of all.

    Inside the encoder tokens are sorted by window. The merged features are sorted back.
    """

    family: ClassVar[str] = "qwen2_5vl"

    def __init__(self, multimodal: Any) -> None:
        super().__init__(multimodal)
        depth = self.encoder_info.depth
        self._whole = sorted({layer for layer in multimodal.visual.fullatt_block_indexes if 0 <= layer < depth})
        if self._whole:
            self.encoder_info = replace(self.encoder_info, feature_layer=self._whole[-1])
        self._order = lru_cache(maxsize=64)(self._make_order)

    def attention(self, layer: int) -> Attention:
        if layer not in self._whole:
            usable = ", ".join(map(str, self._whole)) or "none"
            raise UnsupportedModelError(
                f"layer {layer} of this vision encoder attends within windows, and scores of different windows cannot "
                f"be compared; layers with attention over the whole frame: {usable}"
            )
        return super().attention(layer)

    def layouts(self, modality: str, arguments: Mapping[str, Any]) -> list[Layout]:
        layouts = super().layouts(modality, arguments)
        # Uploaded now, so that nothing waits for the encoder later.
        self._order(self._grids(layouts), self.multimodal.visual.blocks[-1].attn.qkv.weight.device)
        return layouts

    def in_order(self, scores: Tensor, layouts: Sequence[Layout]) -> Tensor:
        return scores[self._order(self._grids(layouts), scores.device)]

    def _grids(self, layouts: Sequence[Layout]) -> tuple[tuple[int, int, int], ...]:
        grids = (layout.grid for layout in layouts)
        return tuple((frames, rows * self.merge, columns * self.merge) for frames, rows, columns in grids)

    def _make_order(self, grids: tuple[tuple[int, int, int], ...], device: torch.device) -> Tensor:
        """`(tokens of all inputs,)` int64: where each token stands inside the encoder."""
        visual = self.multimodal.visual
        # Grids on the CPU: the function reads them back.
        index, _ = get_vision_window_index(
            torch.tensor(grids, device="cpu"), self.merge, visual.window_size, visual.patch_size
        )
        return index.argsort().to(device)
