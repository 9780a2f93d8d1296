"""`random`: the baseline that looks at nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vtc.compressor import Compressor, register
from vtc.select import shuffled
from vtc.selection import Selection
from vtc.visual import Visual


@register("random")
@dataclass(kw_only=True)
class Random(Compressor):
    """Keep a random set of tokens: the floor that every strategy has to beat.

    The set is a function of the seed and of the number of tokens, and of nothing else: all inputs of one size lose the
    same places, in any row of any batch, on any device, in any order of calls. A generator with a state would make an
    input's tokens depend on what ran before it, so that a row of a batch would differ from the same row alone and a
    repeated call from the first one.

    One seed is one draw: compare with the mean over several (three or more), and give the spread.

    Positions are contiguous by default, as for the other strategies that act before the language model.

    Attributes:
        seed: which of the random sets.
    """

    positions: Literal["original", "contiguous"] = "contiguous"
    seed: int = 0

    def select(self, visual: Visual) -> Selection:
        batch, tokens = visual.inputs, visual.layout.tokens
        index = shuffled(tokens, self.seed, visual.device)[: self.budget(visual.layout)]  # (K,)
        return Selection.keep(index.expand(batch, -1), tokens)
