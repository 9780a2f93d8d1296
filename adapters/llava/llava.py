"""LLaVA-1.5: a CLIP or SigLIP tower, an MLP projector, one square view per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.adapters.base import Adapter, Attention
from vtc.errors import UnsupportedModelError, VtcError
from vtc.visual import Encoder, Layout


class LlavaAdapter(Adapter):
    """`LlavaModel` of transformers, as in `LlavaForConditionalGeneration`."""

    family: ClassVar[str] = "llava"

    def __init__(self, multimodal: Any) -> None:
        config = multimodal.config
        vision = config.vision_config
        self.multimodal = multimodal
        self.encoder = multimodal.vision_tower
        self.projector = multimodal.multi_modal_projector
        self.language_model = multimodal.language_model
        self.rotary = multimodal.language_model.rotary_emb
        self.text_config = config.text_config

        # Some releases nest the tower once more.
        tower: Any = getattr(self.encoder, "vision_model", self.encoder)
        name = type(self.encoder).__name__
        if name not in ("CLIPVisionModel", "SiglipVisionModel"):
            raise UnsupportedModelError(
                f"LLaVA with a {name} tower is not supported; CLIPVisionModel and SiglipVisionModel are"
            )
        self._layers = tower.encoder.layers
        class_token = hasattr(tower.embeddings, "class_embedding")
        select, per_patch = config.vision_feature_select_strategy, "default" if class_token else "full"
        if select != per_patch:
            raise UnsupportedModelError(
                f"vision_feature_select_strategy='{select}' does not leave one token per patch of this {name}; "
                f"'{per_patch}' does"
            )
        depth = len(self._layers)
        layer = config.vision_feature_layer
        layer = layer if isinstance(layer, int) else layer[-1]
        # hidden_states[0] is the embedding: entry k is the output of layer k - 1, entry -m that of layer depth - m.
        feature_layer = depth + layer if layer < 0 else layer - 1
        if not 0 <= feature_layer < depth:
            raise UnsupportedModelError(f"vision_feature_layer={layer} is not one of the encoder's {depth} layers")
        self.encoder_info = Encoder(depth=depth, feature_layer=feature_layer, class_token=class_token)
        side = vision.image_size // vision.patch_size
        self._grid = (1, side, side)
        self.tokens_per_image = side * side
        self.fit = "crop" if class_token else "resize"

    def attention(self, layer: int) -> Attention:
        module = self._layers[layer].self_attn
        return Attention(module, module.q_proj, module.k_proj, module.num_heads, module.scale)

    def token_rows(self, rows: Tensor) -> Tensor:
        return rows[:, 1:] if self.encoder_info.class_token else rows

    def placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        token = self.multimodal.config.image_token_id
        if input_ids is not None:
            return input_ids == token
        if inputs_embeds is None:
            raise VtcError("the model was called with neither input_ids nor inputs_embeds")
        ids = torch.full((), token, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.multimodal.get_input_embeddings()(ids)).all(-1)

    def layouts(self, features: Sequence[Tensor]) -> list[Layout]:
        for image in features:
            if image.shape[0] != self.tokens_per_image:
                raise VtcError(
                    f"an image has {image.shape[0]} visual tokens, not {self.tokens_per_image}: calls that "
                    "split it (prefill_chunk_size) or override vision_feature_select_strategy cannot be compressed"
                )
        return [Layout(tokens=image.shape[0], grid=self._grid) for image in features]
