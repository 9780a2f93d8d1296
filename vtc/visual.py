"""`Visual`: what a strategy may look at. Computed only when asked for, and only if declared in `needs`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtc.errors import SpecError


@dataclass(frozen=True)
class Layout:
    """The sizes of one visual input (one image, or one clip), known before any content is.

    Attributes:
        tokens: number of visual tokens `N` that the language model would see.
        grid: `(frames, rows, columns)` of the tokens.
    """

    tokens: int
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class Encoder:
    """What a strategy may know about the vision encoder when it chooses the layers it reads.

    Attributes:
        depth: number of transformer layers.
        feature_layer: 0-based index of the layer whose output goes to the projector.
        class_token: whether the encoder has a [CLS] token.
    """

    depth: int
    feature_layer: int
    class_token: bool

    def layer(self, index: int) -> int:
        """The 0-based index of a layer that is counted from 0, or from the end with -1 as the last."""
        if not -self.depth <= index < self.depth:
            raise SpecError(
                f"layer {index} does not exist: this vision encoder has {self.depth} layers, "
                f"{-self.depth} to {self.depth - 1}"
            )
        return index % self.depth


@dataclass
class Visual:
    """A batch of visual inputs of one layout, as one strategy sees them.

    The inputs share a layout, so no strategy ever meets padding. What is not declared in `needs` raises
    `AttributeError`.

    Attributes:
        layout: the sizes of each input, `N` tokens among them.
        inputs: how many inputs there are, `B`.
        device: where the selection is wanted.
    """

    layout: Layout
    inputs: int
    device: torch.device
    loaders: Mapping[str, Callable[[], Tensor]] = field(repr=False)
    _cache: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def features(self) -> Tensor:
        """`(B, N, D)`: the projected features, as the language model would receive them. Need: `features`."""
        return self._load("features")

    @property
    def saliency(self) -> Tensor:
        """`(B, R, N)` float32: attention that each token gets in the encoder, one row per layer of `Compressor.layers`.

        Probabilities averaged over heads: from the [CLS] token (need: `cls`; softmax over all keys, the [CLS] column
        sliced away and not renormalised), or from all tokens on average (need: `received`). Tokens that are no patches,
        such as newlines between crops, have 0.
        """
        return self._load("saliency")

    def _load(self, name: str) -> Tensor:
        if name not in self._cache:
            if name not in self.loaders:
                raise AttributeError(f"Visual.{name} was not declared: add it to the strategy's `needs`")
            self._cache[name] = self.loaders[name]()
        return self._cache[name]
