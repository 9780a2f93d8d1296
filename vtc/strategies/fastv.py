"""`fastv`: after two layers, keep what the last token of the prompt looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.compressor import LayerCompressor, register
from vtc.select import top_k
from vtc.selection import Selection
from vtc.visual import Visual


@register("fastv")
@dataclass(kw_only=True)
class FastV(LayerCompressor):
    """Keep the tokens that the last token of the prompt attends to most, in one early decoder layer.

    The score of a token is the attention probability from the last prompt token to it, averaged over heads, in the
    layer just before the cut; the best `keep` survive in raster order. The prompt's last token has read the question,
    so the choice depends on it. Separators such as newlines are candidates like any other token.

    FastV (arXiv 2403.06764). The paper's K=2, R=50 % is `layer=2,keep=0.5`: the attention of layer 1, counted from 0,
    decides what layers 2 and later see. Where the official code differs:

    - It needs layer K-1 to run in eager attention, for its whole map. Here the one row that is needed is computed from
      that layer's queries and keys, under the prompt's causal and padding mask; the layer runs as it always does.
    - It knows one span of visual tokens, at places written into the code, in a batch of one. Here every visual input of
      every prompt has its own budget.
    - Its variants round the number of survivors half to even or down; here halves go up. Ties go to the lowest index,
      where `topk` leaves them open.
    - Its variant without a cache chooses again for each generated token, and the one that makes its tables only masks.
      Here the choice is made once, as in its variant with a cache.

    Positions stay as they were, as in the code.

    Attributes:
        layer: the paper's K, 2 by default.
    """

    paper: ClassVar[str] = "2403.06764"
    code: ClassVar[str] = "pkunlp-icler/FastV"

    keep: int | float = 0.5
    layer: int | float = 2

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention"})

    def select(self, visual: Visual) -> Selection:
        return Selection.keep(top_k(visual.attention, visual.budget), visual.layout.tokens)
