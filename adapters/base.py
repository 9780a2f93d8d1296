"""`Adapter`: the interface of a model family. One file per family implements it, in about 100 lines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vtc.errors import VtcError
from vtc.visual import Encoder, Layout


@dataclass(frozen=True)
class Attention:
    """One self-attention layer of a vision encoder, as far as its scores are concerned.

    Attributes:
        module: the attention module; its forward runs each projection once.
        projections: the modules whose outputs hold queries and keys.
        split: turns these outputs, and the arguments of `module` by name, into queries and keys: `(B, S, heads,
            head_dim)` each, or `(S, heads, head_dim)` if inputs are packed one after the other.
        scale: factor applied to the dot products before the softmax.
        offsets: of packed inputs, the argument of `module` with the `(B + 1,)` borders between sequences.
    """

    module: nn.Module
    projections: tuple[nn.Module, ...]
    split: Callable[[Sequence[Tensor], Mapping[str, Any]], tuple[Tensor, Tensor]]
    scale: float
    offsets: str | None = None


class Adapter(ABC):
    """Where the parts of one multimodal model are, and how its visual tokens are laid out.

    Attributes:
        family: a name for messages and result rows.
        multimodal: the module that runs the encoder, fills the placeholders and calls the language model. It has
            `get_image_features`, and `get_video_features` if it takes clips.
        encoder, projector, language_model: its parts.
        text_config: configuration of the language model.
        encoder_info: what strategies may know about the encoder.
        tokens_per_image: visual tokens of every image, if they do not depend on the image.
        fit: how the processor brings an image to the encoder's shape: `"crop"` (shortest edge, then centre crop) or
            `"resize"` (squashed); for pictures.
        coordinates: whether positions are coordinates (M-RoPE), which are never renumbered.
        joined: whether features of neighbouring placeholders belong to one visual input (tiles of one image).
        first_cut: the first decoder layer in front of which tokens can be dropped.
    """

    family: ClassVar[str]
    coordinates: ClassVar[bool] = False
    joined: ClassVar[bool] = False
    first_cut: int = 1

    multimodal: Any
    encoder: nn.Module
    projector: nn.Module
    language_model: Any
    text_config: Any
    encoder_info: Encoder
    tokens_per_image: int | None
    fit: Literal["crop", "resize"]

    @abstractmethod
    def attention(self, layer: int) -> Attention:
        """The self-attention of encoder layer `layer` (0-based)."""

    @abstractmethod
    def layouts(self, modality: str, arguments: Mapping[str, Any]) -> list[Layout]:
        """The layout of each visual input, from the arguments of `get_image_features` or `get_video_features`, by name.

        It runs before the encoder does, so sizes that are on the device may be read: nothing is waited for yet.

        Args:
            modality: `"image"` or `"video"`.
            arguments: as the model's own code passed them; options that were not passed are missing.
        """

    def features(self, modality: str, output: Any) -> list[Tensor]:
        """`(N_i, D)` per visual input: what the model writes to its placeholders, from the encoder's output."""
        return list(output.pooler_output)

    @abstractmethod
    def token_rows(self, modality: str, rows: Tensor, layouts: Sequence[Layout]) -> list[Tensor]:
        """Map scores of encoder positions to the tokens that the language model sees, `(N_i,)` per visual input.

        `rows` is `(P, S)`, or `(S,)` for packed inputs. Where the model averages or interpolates features, scores go
        the same way; separators get 0.
        """

    def longest(self, layouts: Sequence[Layout]) -> int | None:
        """Length, in patches, of the longest packed sequence that the encoder attends within; `None` if not packed."""
        return None

    def placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> dict[str, Tensor]:
        """`(B, S)` bool per modality: the places of the prompt that its tokens fill, in row-major order."""
        config = self.multimodal.config
        tokens = {"image": config.image_token_id, "video": getattr(config, "video_token_id", None)}
        return {
            modality: self._is(token, input_ids, inputs_embeds)
            for modality, token in tokens.items()
            if token is not None
        }

    def _is(self, token: int, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if input_ids is not None:
            return input_ids == token
        if inputs_embeds is None:
            raise VtcError("the model was called with neither input_ids nor inputs_embeds")
        ids = torch.full((), token, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.multimodal.get_input_embeddings()(ids)).all(-1)
