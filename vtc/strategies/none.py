"""`none`: the baseline that keeps everything."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtc.compressor import Compressor, register
from vtc.errors import SpecError
from vtc.selection import Selection
from vtc.visual import Visual


@register("none")
@dataclass(kw_only=True)
class NoCompression(Compressor):
    """Keep every visual token: the uncompressed model, as a row of its own in a comparison.

    Any `keep` other than 1.0 is refused rather than ignored, so that a table never shows a budget that was not used.
    Positions change under neither policy, as nothing is dropped.
    """

    keep: int | float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.keep, float) or self.keep != 1.0:  # the int 1 is one token
            raise SpecError(f"none: keep={self.keep} was given, but 'none' keeps everything: leave keep out or use 1.0")

    def select(self, visual: Visual) -> Selection:
        batch, tokens = visual.inputs, visual.layout.tokens
        return Selection.keep(torch.arange(tokens, device=visual.device).expand(batch, -1), tokens)
