"""`divprune`: keep the tokens that are least like each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vtc.compressor import Compressor, register
from vtc.select import distinct, k_center, most_isolated
from vtc.selection import Selection
from vtc.visual import Visual


@register("divprune")
@dataclass(kw_only=True)
class DivPrune(Compressor):
    """Keep the tokens that are farthest apart: max-min diversity of the projected features.

    The distance of two tokens is one minus the cosine of their features. The first survivor is the token whose nearest
    other token is the farthest away; then, again and again, the token farthest from its nearest survivor. Neither the
    question nor the encoder's attention is looked at. Separators such as newlines are candidates like any other token;
    as they are copies of one, a second one survives only when nothing else is left.

    DivPrune (arXiv 2503.02175). Written from the paper's formulas. Where the official code differs:

    - It can take the same token twice when all that is left has distance zero; here a survivor is out of the game, so
      that exactly `keep` distinct tokens survive, lowest index first among equals.
    - It measures the distance of two copies, which rounding makes now zero and now not; here copies of a separator are
      left out until the end, and the first survivor is never one of them, as if that distance were always zero.
    - It keeps 9.8 % by default, and rounds half to even; here it is a quarter, and halves go up.
    - It compares features in the model's precision and holds all pairwise distances; here distances are float32, and
      of long inputs one row of them is computed per choice.

    Positions are contiguous by default: the code shortens the sequence before the language model numbers it.
    """

    paper: ClassVar[str] = "2503.02175"
    code: ClassVar[str] = "vbdi/divprune"

    positions: Literal["original", "contiguous"] = "contiguous"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"features"})

    def select(self, visual: Visual) -> Selection:
        layout, rows = visual.layout, visual.features  # (B, N, D)
        budget = self.budget(layout)
        own, copies = distinct(layout, rows.device)
        start = None
        if len(copies):
            # With one copy beside it, the separator is not isolated, and all other tokens have the neighbours they had.
            start = most_isolated(rows[:, torch.cat([own, copies[:1]])]).clamp(max=len(own) - 1)
            rows = rows[:, own]
        index = own[k_center(rows, min(budget, len(own)), start)]
        rest = copies[: max(0, budget - len(own))].expand(visual.inputs, -1)
        return Selection.keep(torch.cat([index, rest], dim=1), layout.tokens)
