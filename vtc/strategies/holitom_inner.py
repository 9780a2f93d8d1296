"""`holitom-inner`: inside the language model, merge what is looked at least into what it resembles most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.compressor import LayerCompressor, register
from vtc.kernels import assign
from vtc.select import top_k
from vtc.selection import Selection
from vtc.visual import Visual


@register("holitom-inner")
@dataclass(kw_only=True)
class HoliTomInner(LayerCompressor):
    """Keep the tokens that the last token of the prompt attends to most, and merge each other one into its nearest.

    This is the stage of HoliTom that acts inside the language model. The best `keep` by attention probability from the
    last prompt token, averaged over heads, in the layer just before the cut, become centres. Each dropped token goes to
    the centre whose hidden state has the largest cosine with its own. Then, in raster order, each dropped token is
    averaged with what its centre has become: a centre `h_0` with members `h_1` to `h_m` ends as
    `h_0 / 2^m + sum_i h_i / 2^(m - i + 1)`, in which the last member weighs a half. Separators such as newlines are
    tokens like any other: they may be dropped, and merged into.

    HoliTom (arXiv 2505.21334). Where the official code differs:

    - It averages in a loop over the dropped tokens, in the model's precision. Here the weights above are written down
      at once and the sums are float32, as are cosines.
    - It runs the layer before the cut in eager attention, for its whole map; where a model for sdpa has prepared no
      mask, that layer is not causal. Here the one row that is needed is computed from the layer's queries and keys,
      under the prompt's causal and padding mask; the layer runs as it always does.
    - It reads row 0 of a batch and one span of visual tokens. Here every visual input of every prompt has its own
      budget and merges within itself.
    - It rounds the number of survivors half to even; here halves go up. Ties go to the lowest index, where `topk` and
      `max` leave them open.

    Positions stay as they were, as in the code.

    Attributes:
        layer: the paper cuts in front of layer 18 of 28 (7B) and 60 of 80 (72B), counted from 0. The default is the
            first, as a fraction; for the second say `layer=60`. The code's own default of 3 is not what was published.
        merge: `"halving"` as published. `"mean"` gives a centre and its members equal weights, `"drop"` merges nothing.
    """

    paper: ClassVar[str] = "2505.21334"
    code: ClassVar[str] = "cokeshao/HoliTom"

    keep: int | float = 0.5
    layer: int | float = 0.64
    merge: Literal["halving", "mean", "drop"] = "halving"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention"}) if self.merge == "drop" else frozenset({"attention", "features"})

    def select(self, visual: Visual) -> Selection:
        kept = Selection.keep(top_k(visual.attention, visual.budget), visual.layout.tokens)
        if self.merge == "drop":
            return kept
        slot = assign(visual.features, kept.index)  # (B, N)
        slot, source, weight = halves(kept.index, slot) if self.merge == "halving" else means(slot)
        return Selection(kept.index, kept.size, slot, source, weight)


def halves(index: Tensor, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entries `(slot, source, weight)`, `(B, N)` each, of averaging every member with its centre in raster order.

    `index` `(B, K)` are the centres, ascending; `slot` `(B, N)` is the one that each token belongs to.
    """
    member = torch.ones_like(slot).scatter_(1, index, 0)  # (B, N): 0 for centres
    # Groups one after the other, in each the centre first and then its members in raster order.
    group, source = (2 * slot + member).sort(dim=1, stable=True)
    slot, member = group // 2, group % 2
    stop = torch.searchsorted(slot, slot, right=True)  # one past the last of its group
    after = stop - 1 - torch.arange(slot.shape[1], device=slot.device)  # averaged in later, each time halving it
    return slot, source, torch.exp2(-(after + member).float())


def means(slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entries `(slot, source, weight)`, `(B, N)` each, of the mean of every group."""
    slot, source = slot.sort(dim=1, stable=True)
    size = torch.searchsorted(slot, slot, right=True) - torch.searchsorted(slot, slot)
    return slot, source, size.float().reciprocal()
