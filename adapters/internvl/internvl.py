"""InternVL: square tiles of an image, each encoded on its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from vtc.adapters.base import Adapter, Attention
from vtc.errors import UnsupportedModelError
from vtc.visual import Encoder, Layout


class InternVLAdapter(Adapter):
    """`InternVLModel` of transformers, as in `InternVLForConditionalGeneration`.

    The model is never told which tiles make up one image: tiles whose tokens follow each other in the prompt do. The
    frames of a clip are images with text between them, so each is a visual input of its own.
    """

    family: ClassVar[str] = "internvl"
    joined: ClassVar[bool] = True

    def __init__(self, multimodal: Any) -> None:
        config = multimodal.config
        self.multimodal = multimodal
        self.encoder = multimodal.vision_tower
        self.projector = multimodal.multi_modal_projector
        self.language_model = multimodal.language_model
        self.text_config = config.text_config

        name = type(self.encoder).__name__
        if name != "InternVLVisionModel":
            raise UnsupportedModelError(f"InternVL with a {name} tower is not supported; InternVLVisionModel is")
        if config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy='{config.vision_feature_select_strategy}' does not leave one feature "
                "per patch; 'default' does"
            )
        depth = len(multimodal.vision_tower.encoder.layer)
        layer = config.vision_feature_layer
        # hidden_states[0] is the embedding: entry k is the output of layer k - 1, entry -m that of layer depth - m.
        feature_layer = -1 if not isinstance(layer, int) else depth + layer if layer < 0 else layer - 1
        if not 0 <= feature_layer < depth:
            raise UnsupportedModelError(f"vision_feature_layer={layer} is not one of the encoder's {depth} layers")
        self.encoder_info = Encoder(depth=depth, feature_layer=feature_layer, class_token=True)
        self.tokens_per_image = None
        self.fit = "resize"

    def attention(self, layer: int) -> Attention:
        module = self.multimodal.vision_tower.encoder.layer[layer].attention

        def split(outputs: Sequence[Tensor], arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
            query, key = (x.unflatten(-1, (module.num_heads, -1)) for x in outputs)
            return query, key

        # The norms follow the projections directly, and are identities in models without them.
        return Attention(module, (module.q_norm, module.k_norm), split, module.scale)

    def layouts(self, modality: str, arguments: Mapping[str, Any]) -> list[Layout]:
        tiles, _, _, width = arguments["pixel_values"].shape
        patch = self.multimodal.config.vision_config.patch_size[1]
        side = int(width // patch * self.multimodal.config.downsample_ratio)
        return [Layout.frames(1, side, side)] * tiles

    def token_rows(self, modality: str, rows: Tensor, layouts: Sequence[Layout]) -> list[Tensor]:
        model = self.multimodal
        side = math.isqrt(rows.shape[1] - 1)
        patches = rows[:, 1:].unflatten(1, (side, side))[..., None]  # (P, side, side, 1)
        squares = model.pixel_shuffle(patches, scale_factor=model.config.downsample_ratio)
        return list(squares.mean(-1).flatten(1))  # the patches of one token are channels now
