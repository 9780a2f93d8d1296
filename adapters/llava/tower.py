"""What all LLaVAs share: a CLIP or SigLIP tower, a projector, a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vtc.adapters.base import Adapter, Attention
from vtc.errors import UnsupportedModelError
from vtc.visual import Encoder


class TowerAdapter(Adapter):
    """A model with `vision_tower`, `multi_modal_projector` and `language_model`, one token per patch.

    Attributes:
        side: rows and columns of patches in one view.
    """

    side: int

    def __init__(self, multimodal: Any) -> None:
        config = multimodal.config
        vision = config.vision_config
        self.multimodal = multimodal
        self.encoder = multimodal.vision_tower
        self.projector = multimodal.multi_modal_projector
        self.language_model = multimodal.language_model
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
        self.side = vision.image_size // vision.patch_size
        self.tokens_per_image = None
        self.fit = "crop" if class_token else "resize"

    def attention(self, layer: int) -> Attention:
        module = self._layers[layer].self_attn

        def split(outputs: Sequence[Tensor], arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
            query, key = (x.unflatten(-1, (module.num_heads, -1)) for x in outputs)
            return query, key

        return Attention(module, (module.q_proj, module.k_proj), split, module.scale)

    def patches(self, rows: Tensor) -> Tensor:
        """Scores of the patches alone, `(P, side * side)`."""
        return rows[:, 1:] if self.encoder_info.class_token else rows
