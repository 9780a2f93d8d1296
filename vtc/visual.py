"""`Visual`: what a strategy may look at. Computed only when asked for, and only if declared in `needs`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtc.errors import SpecError


@dataclass(frozen=True)
class View:
    """A grid of tokens in row-major order: a picture, all crops of one on their canvas, or one frame of a clip.

    Attributes:
        start: number of its first token in the visual input.
        rows, columns: size of the grid.
        separators: tokens after each row that show nothing, such as a newline.
        crops: `(rows, columns)` of the crops that make up the canvas.
        box: `(top, left, bottom, right)`, in fractions of that canvas: the part the grid covers. The rest is padding,
            for which there are no tokens.
    """

    start: int
    rows: int
    columns: int
    separators: int = 0
    crops: tuple[int, int] = (1, 1)
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    @property
    def stop(self) -> int:
        """One past its last token, separators included."""
        return self.start + self.rows * (self.columns + self.separators)

    def places(self) -> list[int]:
        """Numbers of its `rows * columns` tokens in the visual input, without separators."""
        width = self.columns + self.separators
        return [self.start + row * width + column for row in range(self.rows) for column in range(self.columns)]


@dataclass(frozen=True)
class Layout:
    """The sizes of one visual input (one image with all its crops, or one clip), known before any content is.

    Attributes:
        tokens: number of visual tokens `N` that the language model would see, separators included.
        views: the grids of tokens among them, in order. An image in several resolutions has its thumbnail first, then
            the crops on their canvas; a clip has one view per frame. Tokens of no view are separators.
        clip: whether the views are frames that follow each other in time.
    """

    tokens: int
    views: tuple[View, ...]
    clip: bool = False

    @classmethod
    def frames(cls, frames: int, rows: int, columns: int, separators: int = 0, clip: bool = False) -> Layout:
        """`frames` grids of `rows` x `columns` one after the other, and `separators` tokens after the last."""
        size = rows * columns
        views = tuple(View(frame * size, rows, columns) for frame in range(frames))
        return cls(frames * size + separators, views, clip or frames > 1)

    @property
    def grid(self) -> tuple[int, int, int]:
        """`(frames, rows, columns)` of its views if all are alike, else `(1, 1, tokens)`."""
        shapes = {(view.rows, view.columns) for view in self.views}
        return (len(self.views), *shapes.pop()) if len(shapes) == 1 else (1, 1, self.tokens)


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
        layout: the sizes of each input, `N` tokens among them. At a decoder layer these are the tokens that are left.
        inputs: how many inputs there are, `B`.
        device: where the selection is wanted.
        budget: how many tokens of each input are to survive, `K`.
    """

    layout: Layout
    inputs: int
    device: torch.device
    loaders: Mapping[str, Callable[[], Tensor]] = field(repr=False)
    budget: int = 0
    _cache: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def features(self) -> Tensor:
        """`(B, N, D)`: the projected features, as the language model would receive them; at a decoder layer, its input
        hidden states. Need: `features`."""
        return self._load("features")

    @property
    def saliency(self) -> Tensor:
        """`(B, R, N)` float32: attention that each token gets in the encoder, one row per layer of `Compressor.layers`.

        Probabilities averaged over heads: from the [CLS] token (need: `cls`; softmax over all keys, the [CLS] column
        sliced away and not renormalised), or from all tokens on average (need: `received`). Or the scaled dot products
        of [CLS], averaged over heads, before any softmax (need: `logits`). Tokens that are no patches, such as newlines
        between crops, have 0.
        """
        return self._load("saliency")

    @property
    def attention(self) -> Tensor:
        """`(B, N)` float32, at a decoder layer: attention that each token gets from the last token of its prompt.

        Probabilities over the whole prompt, averaged over heads: in the layer just run (need: `attention`), or in the
        layer about to run (need: `ahead`).
        """
        return self._load("attention")

    @property
    def exchange(self) -> Tensor:
        """`(B, 2)` float32, at a decoder layer: attention that text pays to visual tokens, and visual tokens to text.

        Mean attention mass in the layer just run, per prompt, over all its visual inputs. Text is what follows the
        first visual token. Need: `exchange`.
        """
        return self._load("exchange")

    def _load(self, name: str) -> Tensor:
        if name not in self._cache:
            if name not in self.loaders:
                raise AttributeError(f"Visual.{name} was not declared: add it to the strategy's `needs`")
            self._cache[name] = self.loaders[name]()
        return self._cache[name]
