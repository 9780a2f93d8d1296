"""LLaVA-OneVision: AnyRes crops, scaled down when they are many; several images of one view each; pooled frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.adapters.llava.anyres import AnyResAdapter, Picture


class LlavaOnevisionAdapter(AnyResAdapter):
    """`LlavaOnevisionModel` of transformers, as in `LlavaOnevisionForConditionalGeneration`."""

    family: ClassVar[str] = "llava_onevision"
    clip_separators: ClassVar[int] = 1

    def __init__(self, multimodal: Any) -> None:
        super().__init__(multimodal)
        self.fit = "resize"

    def pictures(self, arguments: Mapping[str, Any]) -> list[Picture]:
        sizes = torch.as_tensor(arguments["image_sizes"]).tolist()
        aspect = arguments.get("vision_aspect_ratio") or self.multimodal.config.vision_aspect_ratio
        counts = arguments.get("batch_num_images")
        counts = [1] * len(sizes) if counts is None else torch.as_tensor(counts).tolist()
        alone = [count == 1 for count in counts for _ in range(count)]  # images of a prompt with several get no crops
        return [
            Picture(height, width, self._views(height, width) if crops else 1, aspect)
            for (height, width), crops in zip(sizes, alone, strict=False)
        ]

    def pack(self, features: Tensor, picture: Picture, newline: Tensor, whole: bool) -> Tensor:
        # "anyres_max_9" scales the canvas down to about 9 views: it is never larger than all its crops.
        aspect = f"anyres_max_{picture.views}" if whole else picture.aspect
        size = (picture.height, picture.width)
        packed, _ = self.multimodal.pack_image_features(
            [features], [size], image_newline=newline, vision_aspect_ratio=aspect
        )
        return packed[0]

    def pool(self, frames: Tensor) -> Tensor:
        return self.multimodal.apply_pooling(frames)
