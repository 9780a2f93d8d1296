"""`Adapter`: the interface of a model family. One file per family implements it, in about 100 lines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from vtc.visual import Encoder, Layout


@dataclass(frozen=True)
class Attention:
    """One self-attention layer of a vision encoder, as far as its scores are concerned.

    Attributes:
        module: the attention module; its forward runs `query` and `key` once each.
        query, key: the projections, whose outputs are `(B, S, heads * head_dim)`.
        heads: number of heads.
        scale: factor applied to the dot products before the softmax.
    """

    module: nn.Module
    query: nn.Module
    key: nn.Module
    heads: int
    scale: float


class Adapter(ABC):
    """Where the parts of one multimodal model are, and how its visual tokens are laid out.

    Attributes:
        family: a name for messages and result rows.
        multimodal: the module that runs the encoder, fills the placeholders and calls the language model.
        encoder, projector, language_model: its parts.
        rotary: the module that turns position ids into rotary embeddings.
        encoder_info: what strategies may know about the encoder.
        tokens_per_image: visual tokens of every image, if they do not depend on the image.
        fit: how the processor brings an image to the encoder's shape: `"crop"` (shortest edge, then centre crop) or
            `"resize"` (squashed); for pictures.
    """

    family: ClassVar[str]

    multimodal: Any
    encoder: nn.Module
    projector: nn.Module
    language_model: nn.Module
    rotary: nn.Module
    text_config: Any
    encoder_info: Encoder
    tokens_per_image: int | None
    fit: Literal["crop", "resize"]

    @abstractmethod
    def attention(self, layer: int) -> Attention:
        """The self-attention of encoder layer `layer` (0-based)."""

    @abstractmethod
    def token_rows(self, rows: Tensor) -> Tensor:
        """Map saliency over encoder positions, `(I, S)`, to the `(I, N)` tokens that reach the language model."""

    @abstractmethod
    def placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """`(B, S)` bool: the places of the prompt that visual tokens fill, in row-major order."""

    @abstractmethod
    def layouts(self, features: Sequence[Tensor]) -> list[Layout]:
        """The layout of each visual input of a call, from its projected features `(N_i, D)`."""
