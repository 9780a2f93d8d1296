"""LLaVA-NeXT-Video: images as in LLaVA-NeXT, and clips: pooled frames one after the other, without newlines."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from vtc.adapters.llava.llava_next import LlavaNextAdapter
from vtc.errors import UnsupportedModelError


class LlavaNextVideoAdapter(LlavaNextAdapter):
    """`LlavaNextVideoModel` of transformers, as in `LlavaNextVideoForConditionalGeneration`."""

    family: ClassVar[str] = "llava_next_video"

    def __init__(self, multimodal: Any) -> None:
        super().__init__(multimodal)
        mode = multimodal.config.spatial_pool_mode
        if mode == "conv":
            raise UnsupportedModelError(
                "spatial_pool_mode='conv' mixes patches by learned weights of their features, which says nothing about "
                "scores; 'average' and 'max' are supported"
            )

    def pool(self, frames: Tensor) -> Tensor:
        return self.multimodal.vision_resampler(frames)
