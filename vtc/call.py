"""State of one call of a model: what the hooks hand to each other. It dies with the call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vtc.boundary import Places, Stretch
from vtc.cache import CacheState
from vtc.choice import Group
from vtc.visual import Layout


@dataclass(frozen=True)
class Stage:
    """What one compressor did at one place.

    Attributes:
        spec: the compressor.
        layer: in front of which decoder layer; 0 is the language model's input.
        groups: the visual inputs that shrank.
    """

    spec: str
    layer: int
    groups: Sequence[Group]


@dataclass(frozen=True)
class Record:
    """What a report is made from, on the device where it happened; turned into plain data when somebody asks.

    Attributes:
        layouts: one per visual input.
        modalities: `"image"` or `"video"`, one per visual input.
        stages: in the order they happened.
        prompts: number of prompts.
        sequence: length of the padded prompt, before.
        stretches: `(first layer, length of the padded prompt there)`, ascending.
    """

    layouts: Sequence[Layout]
    modalities: Sequence[str]
    stages: Sequence[Stage]
    prompts: int
    sequence: int
    stretches: Sequence[tuple[int, int]]


@dataclass
class Call:
    """One call of the multimodal module, or of its language model alone.

    Attributes:
        input_ids, inputs_embeds: arguments of the multimodal module.
        has_pixels: whether it was given pixel values.
        alone: whether the language model was called without the multimodal module around it.
        encoded: outputs of the encoder, by modality.
        layouts, modalities: one per visual input.
        cache: that came with the call.
        state: of this cache.
        own_mask: whether the caller prepared the attention mask, which is then cut rather than built anew.
        stretches: the layers that ran so far, by the tokens they saw; empty if the call is none of our business.
        places: where the visual tokens stand in front of the next layer; `None` if there are none.
        left: number of tokens left, per visual input.
        arrived: per compressor inside the language model, the numbers of tokens that arrived at its first cut.
        positions: what the rotary module is to rotate by; `None` for what the model gives it.
        layer_arguments: what layers of the present stretch get instead of the model's own arguments.
        seen: the layer before a cut: its number, input, rotation, stretch, and whether it filled the cache.
        rotated: whether the rotary module has run.
        reached: how many of the decoder layers with a compressor in front of them have run.
        stages: what the compressors did.
    """

    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    has_pixels: bool = False
    alone: bool = False
    encoded: dict[str, Any] = field(default_factory=dict)
    layouts: list[Layout] = field(default_factory=list)
    modalities: list[str] = field(default_factory=list)
    cache: Any = None
    state: CacheState | None = None
    own_mask: bool = False
    stretches: list[Stretch] = field(default_factory=list)
    places: Places | None = None
    left: list[int] = field(default_factory=list)
    arrived: dict[int, list[int]] = field(default_factory=dict)
    positions: Tensor | None = None
    layer_arguments: dict[str, Any] = field(default_factory=dict)
    seen: Seen | None = None
    rotated: bool = False
    reached: int = 0
    stages: list[Stage] = field(default_factory=list)


@dataclass(frozen=True)
class Seen:
    """A decoder layer's view of a call, kept until the next layer."""

    layer: int
    hidden: Tensor
    rotation: tuple[Tensor, Tensor]
    stretch: Stretch
    filled: bool
