"""`divprune`: keep the tokens that are least like each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vtc.compressor import Compressor, register
from vtc.select import k_center
from vtc.selection import Selection
from vtc.visual import Visual


@register("divprune")
@dataclass(kw_only=True)
class DivPrune(Compressor):
    """Keep the tokens that are farthest apart: max-min diversity of the projected features.

    The distance of two tokens is one minus the cosine of their features. The first survivor is the token whose nearest
    other token is the farthest away; then, again and again, the token farthest from its nearest survivor. Neither the
    question nor the encoder's attention is looked at. Separators such as newlines are candidates like any other token;
    as they are all alike, hardly more than one of them survives.

    DivPrune (arXiv 2503.02175). Written from the paper's formulas. Where the official code differs:

    - It can take the same token twice when all that is left has distance zero; here a survivor is out of the game, so
      that exactly `keep` distinct tokens survive, lowest index first among equals.
    - It compares features in the model's precision and holds all pairwise distances; here distances are float32, and
      one row of them is computed per choice.

    Positions are contiguous by default: the code shortens the sequence before the language model numbers it.
    """

    paper: ClassVar[str] = "2503.02175"
    code: ClassVar[str] = "vbdi/divprune"

    positions: Literal["original", "contiguous"] = "contiguous"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"features"})

    def select(self, visual: Visual) -> Selection:
        return Selection.keep(k_center(visual.features, self.budget(visual.layout)), visual.layout.tokens)
