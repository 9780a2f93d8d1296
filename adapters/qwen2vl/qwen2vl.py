"""Qwen2-VL and Qwen3-VL: images and clips of any size, packed one after the other."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from vtc.adapters.base import Adapter, Attention
from vtc.visual import Encoder, Layout


class Qwen2VLAdapter(Adapter):
    """`Qwen2VLModel` of transformers, as in `Qwen2VLForConditionalGeneration`.

    The encoder takes the patches of all images, or of all clips, as one long sequence without padding. Patches attend
    within their frame. Neighbouring patches stand together in squares of `merge` x `merge`, and the projector makes one
    token of each square. A frame is what the processor makes of two pictures of a clip.
    """

    family: ClassVar[str] = "qwen2vl"
    coordinates: ClassVar[bool] = True

    def __init__(self, multimodal: Any) -> None:
        self.multimodal = multimodal
        self.encoder = multimodal.visual
        self.projector = multimodal.visual.merger
        self.language_model = multimodal.language_model
        self.text_config = multimodal.config.text_config
        self.merge: int = multimodal.config.vision_config.spatial_merge_size
        depth = len(multimodal.visual.blocks)
        self.encoder_info = Encoder(depth=depth, feature_layer=depth - 1, class_token=False)
        self.tokens_per_image = None
        self.fit = "resize"

    def attention(self, layer: int) -> Attention:
        module = self.multimodal.visual.blocks[layer].attn
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb_vision

        def split(outputs: Sequence[Tensor], arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
            query, key, _ = outputs[0].unflatten(-1, (3, module.num_heads, -1)).unbind(1)  # (S, heads, head_dim)
            cos, sin = (angle.to(query.device) for angle in arguments["position_embeddings"])  # (S, head_dim)
            query, key = rotate(query, key, cos, sin)
            return query, key

        return Attention(module, (module.qkv,), split, module.scaling, offsets="cu_seqlens")

    def layouts(self, modality: str, arguments: Mapping[str, Any]) -> list[Layout]:
        grids = arguments[f"{modality}_grid_thw"].tolist()  # in patches
        clip = modality == "video"
        return [
            Layout.frames(frames, rows // self.merge, columns // self.merge, clip=clip)
            for frames, rows, columns in grids
        ]

    def longest(self, layouts: Sequence[Layout]) -> int | None:
        return max(view.rows * view.columns for layout in layouts for view in layout.views) * self.merge**2

    def token_rows(self, modality: str, rows: Tensor, layouts: Sequence[Layout]) -> list[Tensor]:
        scores = self.in_order(rows.unflatten(0, (-1, self.merge**2)).mean(1), layouts)  # one per token
        return list(scores.split([layout.tokens for layout in layouts]))

    def in_order(self, scores: Tensor, layouts: Sequence[Layout]) -> Tensor:
        """One score per token of all inputs, from the order inside the encoder to that of the features."""
        return scores


class Qwen3VLAdapter(Qwen2VLAdapter):
    """`Qwen3VLModel` of transformers, as in `Qwen3VLForConditionalGeneration`.

    Its prompts have text (the time) between the frames of a clip, which is one visual input all the same.
    """

    family: ClassVar[str] = "qwen3vl"

    def __init__(self, multimodal: Any) -> None:
        super().__init__(multimodal)
        # Features of earlier encoder layers are added to the visual tokens after the first decoder layers.
        self.first_cut = max(1, len(multimodal.config.vision_config.deepstack_visual_indexes))
