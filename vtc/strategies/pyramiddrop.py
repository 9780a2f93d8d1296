"""`pyramiddrop`: drop in stages, a constant share at each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vtc.compressor import DecoderCompressor, register
from vtc.errors import SpecError, UnsupportedModelError
from vtc.select import top_k
from vtc.selection import Selection
from vtc.visual import Layout, Visual

EXACT = 1e-6  # the cube root of 0.343 is 0.7, however floating point rounds it


@register("pyramiddrop")
@dataclass(kw_only=True)
class PyramidDrop(DecoderCompressor):
    """Keep what the last token of the prompt attends to, and less and less of it from stage to stage.

    The decoder is cut into `stages + 1` parts of equal depth. In front of each part but the first, tokens are ranked by
    the attention probability from the last prompt token, averaged over heads, in the layer about to run. Stage `s`
    leaves `N * keep ** (s / stages)` of the `N` tokens that arrive at the first cut, so that each drops the same share
    and `keep` is left after the last. Survivors are in raster order. Separators such as newlines are candidates like
    any other token.

    PyramidDrop (arXiv 2410.17247). The published setting is the default: three stages that halve, in front of layers 8,
    16 and 24 of 32, counted from 0. Where the official code differs:

    - It takes the layers and the share left after each as lists; here both follow from `stages` and `keep`. Layers of a
      depth that does not divide evenly are rounded down. So are numbers of survivors, as in the code, but not below 1.
    - It knows one image per prompt, padded on the right. Here every visual input of every prompt has its own budget,
      and the row of attention respects the prompt's causal and padding mask.
    - While training it averages over the rows of all questions; here there is one row, as when it generates.
    - Ties go to the lowest index, where `topk` leaves them open.

    Positions are contiguous by default: the code numbers the shortened sequence anew after each drop.

    Attributes:
        keep: how many tokens are left after the last stage: an int counts tokens, a float is a fraction.
        stages: how many times tokens are dropped.
    """

    paper: ClassVar[str] = "2410.17247"
    code: ClassVar[str] = "Cooperx521/PyramidDrop"

    keep: int | float = 0.125
    positions: Literal["original", "contiguous"] = "contiguous"
    stages: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages < 1:
            raise SpecError(f"{self.name}: stages={self.stages} never drops anything: use at least 1")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ahead"})

    def cuts(self, depth: int) -> tuple[int, ...]:
        if depth <= self.stages:
            raise UnsupportedModelError(
                f"{self.name}: stages={self.stages} needs a language model of at least {self.stages + 1} decoder "
                f"layers, and this one has {depth}: use fewer stages"
            )
        return tuple(depth * stage // (self.stages + 1) for stage in range(1, self.stages + 1))

    def budget(self, layout: Layout) -> int:
        count = self.keep if isinstance(self.keep, int) else max(1, int(layout.tokens * self.keep + EXACT))
        return min(count, layout.tokens)

    def budgets(self, layout: Layout) -> tuple[int, ...]:
        last = self.budget(layout)
        share = self.keep if isinstance(self.keep, float) else last / max(1, layout.tokens)
        steps = (int(layout.tokens * share ** (stage / self.stages) + EXACT) for stage in range(1, self.stages))
        return (*(max(last, step) for step in steps), last)

    def select(self, visual: Visual) -> Selection:
        return Selection.keep(top_k(visual.attention, visual.budget), visual.layout.tokens)
