"""`uniform`: the baseline that spreads the survivors evenly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtc.compressor import Compressor, register
from vtc.select import centres, fit_grid, others
from vtc.selection import Selection
from vtc.visual import Visual


@register("uniform")
@dataclass(kw_only=True)
class Uniform(Compressor):
    """Keep an even grid of tokens, whatever they show.

    A frame of `H x W` tokens that may keep `K` is cut into `h x w <= K` equal blocks, of about the frame's own aspect
    (`vtc.select.fit_grid`), and the token in the middle of each is kept; the `K - h w` that remain are spread evenly
    over the tokens not yet kept, in raster order, so that the budget is filled exactly. Several frames share the budget
    equally; what does not divide goes, one token each, to evenly spaced frames. Frames get none when there are more
    frames than tokens to keep.

    Tokens that do not fill their grid (several crops, separators) are spread over as one sequence.

    Positions are contiguous by default, as for the other strategies that act before the language model.
    """

    positions: Literal["original", "contiguous"] = "contiguous"

    def select(self, visual: Visual) -> Selection:
        batch, tokens, device = visual.inputs, visual.layout.tokens, visual.device
        frames, rows, columns = visual.layout.grid
        if frames * rows * columns != tokens:
            frames, rows, columns = 1, 1, tokens
        share, rest = divmod(self.budget(visual.layout), frames)
        richer = centres(rest, frames, device)
        parts = []
        for group, kept in ((others(richer, frames), share), (richer, share + 1)):
            if kept and group.shape[0]:
                cells = _even(rows, columns, kept, device)  # (kept,)
                parts.append((group[:, None] * rows * columns + cells).flatten())
        return Selection.keep(torch.cat(parts).expand(batch, -1), tokens)


def _even(rows: int, columns: int, k: int, device: torch.device) -> Tensor:
    """`(k,)` cells of one frame, not sorted."""
    height, width = fit_grid(rows, columns, k)
    grid = (centres(height, rows, device)[:, None] * columns + centres(width, columns, device)).flatten()
    free = others(grid, rows * columns)
    return torch.cat([grid, free.index_select(0, centres(k - height * width, free.shape[0], device))])
