"""LLaVA-NeXT: AnyRes crops, cut to the image, with a newline token after each row of patches."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from vtc.adapters.llava.anyres import AnyResAdapter, Picture


class LlavaNextAdapter(AnyResAdapter):
    """`LlavaNextModel` of transformers, as in `LlavaNextForConditionalGeneration`."""

    family: ClassVar[str] = "llava_next"

    def __init__(self, multimodal: Any) -> None:
        super().__init__(multimodal)
        self.fit = "resize"  # nothing of an image is cropped away, whatever the tower

    def pack(self, features: Tensor, picture: Picture, newline: Tensor, whole: bool) -> Tensor:
        select = self.multimodal.config.vision_feature_select_strategy
        size = (picture.height, picture.width)
        packed, _ = self.multimodal.pack_image_features([features], [size], select, image_newline=newline)
        return packed[0]
