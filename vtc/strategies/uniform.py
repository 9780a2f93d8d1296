"""`uniform`: the baseline that spreads the survivors evenly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtc.compressor import Compressor, register
from vtc.select import centres, fit_grid, others, places, proportional, separators
from vtc.selection import Selection
from vtc.visual import Layout, Visual


@register("uniform")
@dataclass(kw_only=True)
class Uniform(Compressor):
    """Keep an even grid of tokens, whatever they show.

    A view of `H x W` tokens that may keep `K` is cut into `h x w <= K` equal blocks, of about the view's own aspect
    (`vtc.select.fit_grid`), and the token in the middle of each is kept; the `K - h w` that remain are spread evenly
    over the tokens not yet kept, in raster order, so that the budget is filled exactly.

    Frames, and other views of one size, share the budget equally; what does not divide goes, one token each, to evenly
    spaced ones. They get none when there are more of them than tokens to keep. Views that differ, such as a thumbnail
    and its canvas of crops, share it in proportion to their tokens, by largest remainder.

    Separators such as newlines are dropped, unless the budget has room for them after all tokens that show something.

    Positions are contiguous by default, as for the other strategies that act before the language model.
    """

    positions: Literal["original", "contiguous"] = "contiguous"

    def select(self, visual: Visual) -> Selection:
        layout, device = visual.layout, visual.device
        budget = self.budget(layout)
        cells = places(layout.views, device)  # (V,)
        seen = min(budget, len(cells))
        spread = _alike if layout.grid[0] == len(layout.views) else _unlike
        parts = [cells[spread(layout, seen, device)]]
        if budget > seen:
            parts.append(separators(layout, device)[: budget - seen])
        return Selection.keep(torch.cat(parts).expand(visual.inputs, -1), layout.tokens)


def _alike(layout: Layout, kept: int, device: torch.device) -> Tensor:
    """`(kept,)` places among the tokens of views of one size."""
    views, rows, columns = layout.grid
    share, rest = divmod(kept, views)
    richer = centres(rest, views, device)
    parts = []
    for group, count in ((others(richer, views), share), (richer, share + 1)):
        if count and group.shape[0]:
            parts.append((group[:, None] * rows * columns + _even(rows, columns, count, device)).flatten())
    return torch.cat(parts)


def _unlike(layout: Layout, kept: int, device: torch.device) -> Tensor:
    """`(kept,)` places among the tokens of views of several sizes."""
    sizes = [view.rows * view.columns for view in layout.views]
    parts, start = [], 0
    for view, size, count in zip(layout.views, sizes, proportional(kept, sizes), strict=True):
        if count:
            parts.append(start + _even(view.rows, view.columns, count, device))
        start += size
    return torch.cat(parts)


def _even(rows: int, columns: int, k: int, device: torch.device) -> Tensor:
    """`(k,)` cells of one view, not sorted."""
    height, width = fit_grid(rows, columns, k)
    grid = (centres(height, rows, device)[:, None] * columns + centres(width, columns, device)).flatten()
    free = others(grid, rows * columns)
    return torch.cat([grid, free.index_select(0, centres(k - height * width, free.shape[0], device))])
