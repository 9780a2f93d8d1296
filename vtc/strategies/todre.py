"""`todre`: start from the most attended token and keep what is unlike it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.compressor import Compressor, register
from vtc.select import distinct, full_precision, k_center, max_sum, shuffled, thumbnail, unit
from vtc.selection import Selection
from vtc.visual import Encoder, Visual


@register("todre")
@dataclass(kw_only=True)
class ToDRE(Compressor):
    """Keep the token that [CLS] attends to most, and then those least like everything kept so far.

    This is the first stage of ToDRE, which acts before the language model. The pivot is the token with the highest
    head-averaged attention from [CLS] in the encoder's last layer: of an image with crops, among those of its
    thumbnail; of a clip, among those of all frames. Then, again and again, the token whose cosine similarities to all
    survivors have the smallest sum survives; features are the projected ones. The question is not looked at.

    ToDRE (arXiv 2505.18757). No official code was found. What the paper leaves open, and what is done here:

    - The order of the survivors: raster order. Their positions: contiguous by default, as in the other methods that act
      before the language model.
    - Treatment of heads in the pivot's attention: their mean. Ties: the lowest index.
    - Separators such as newlines, which are copies of one token: the first is a candidate, the others survive only when
      nothing else is left.
    - Tiles of which nothing says what they show, as InternVL's: the pivot is the best of all their tokens.

    Attributes:
        pivot: where to start. `"cls"` as published; for encoders without a class token, the attention that a token
            gets from all tokens on average (`"received"`), any token (`"random"`, which the paper accepts), or the
            token nearest to the mean feature in cosine (`"mean"`, from the paper's ablation).
        objective: `"max-sum"` is the second version of the paper. `"k-center"`, which the first version names, takes
            the token that is least similar to its most similar survivor.
        seed: which random pivot. The place depends on the seed and the number of tokens alone.
    """

    paper: ClassVar[str] = "2505.18757"

    positions: Literal["original", "contiguous"] = "contiguous"
    pivot: Literal["cls", "received", "random", "mean"] = "cls"
    objective: Literal["max-sum", "k-center"] = "max-sum"
    seed: int = 0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"features"} | {self.pivot} & {"cls", "received"})

    def layers(self, encoder: Encoder) -> tuple[int, ...]:
        return (encoder.depth - 1,)

    def select(self, visual: Visual) -> Selection:
        layout, rows = visual.layout, visual.features  # (B, N, D)
        budget = self.budget(layout)
        own, copies = distinct(layout, rows.device)
        rows = rows if not len(copies) else rows[:, own]
        greedy = max_sum if self.objective == "max-sum" else k_center
        index = own[greedy(rows, min(budget, len(own)), self._pivot(visual, rows, own))]
        rest = copies[: max(0, budget - len(own))].expand(visual.inputs, -1)
        return Selection.keep(torch.cat([index, rest], dim=1), layout.tokens)

    def _pivot(self, visual: Visual, rows: Tensor, own: Tensor) -> Tensor:
        """`(B,)`: the first survivor, as a place in `rows` `(B, n, D)`, which are the tokens `own`."""
        if self.pivot == "random":
            return shuffled(rows.shape[1], self.seed, rows.device)[:1].expand(rows.shape[0])
        if self.pivot == "mean":
            mean = unit(rows.float().mean(dim=1, keepdim=True))  # (B, 1, D)
            with full_precision(rows.device):
                return (unit(rows) @ mean.mT).squeeze(2).argmax(dim=1)
        score, whole = visual.saliency[:, 0, own], thumbnail(visual.layout)
        return (score if whole is None else score[:, : whole.stop]).argmax(dim=1)  # the thumbnail comes first
