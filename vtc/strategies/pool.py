"""`pool`: the baseline that averages neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtc.compressor import Compressor, register
from vtc.select import centres, fit_grid, places, proportional, separators
from vtc.selection import Selection
from vtc.visual import Layout, View, Visual


@register("pool")
@dataclass(kw_only=True)
class Pool(Compressor):
    """Average the tokens over an even grid of blocks: nothing is picked, everything is blurred.

    Each frame of `H x W` tokens becomes the `h x w` of about the same aspect that fits into its share of the budget
    (`vtc.select.fit_grid`). Blocks are those of `torch.nn.functional.adaptive_avg_pool2d`, which overlap by a token
    where sizes do not divide. The budget is a ceiling here: `T h w` tokens survive, which can be somewhat fewer than
    `keep` asks for. With fewer tokens to keep than frames, neighbouring frames are averaged too.

    Views that differ, such as a thumbnail and its canvas of crops, share the budget in proportion to their tokens, by
    largest remainder, and each is pooled on its own; one whose share is nothing is dropped. Several tiles of one size
    are treated like frames. Separators such as newlines are dropped, unless the budget has room for them after all
    tokens that show something.

    The features that are averaged are the projected ones, which the language model would have received; pooling before
    the projector would feed it inputs of a kind that it never saw. A survivor stands in the middle of its block.

    Positions are contiguous by default, as for the other strategies that act before the language model.
    """

    positions: Literal["original", "contiguous"] = "contiguous"

    def budget(self, layout: Layout) -> int:
        count = super().budget(layout)
        tokens = sum(view.rows * view.columns for view in layout.views)
        if count > tokens:
            return count
        return sum(frames * rows * columns for _, (frames, rows, columns) in _plan(layout, count))

    def select(self, visual: Visual) -> Selection:
        layout, batch, device = visual.layout, visual.inputs, visual.device
        count, cells = super().budget(layout), places(layout.views, device)
        if count > len(cells):
            index = torch.cat([cells, separators(layout, device)[: count - len(cells)]])
            return Selection.keep(index.expand(batch, -1), layout.tokens)
        anchors, slots, sources, weights = [], [], [], []
        start = survivors = 0
        for grid, kept in _plan(layout, count):
            if kept[0]:
                anchor, source, weight = _blocks(grid, kept, device)
                slot = torch.arange(survivors, survivors + len(anchor), device=device)[:, None].expand_as(source)
                anchors.append(start + anchor)
                slots.append(slot.flatten())
                sources.append(start + source.flatten())
                weights.append(weight.flatten())
                survivors += len(anchor)
            start += grid[0] * grid[1] * grid[2]
        index, source = cells[torch.cat(anchors)], cells[torch.cat(sources)]
        entries = (entry.expand(batch, -1) for entry in (torch.cat(slots), source, torch.cat(weights)))
        return Selection(index.expand(batch, -1), layout.tokens, *entries)


Grid = tuple[int, int, int]  # frames, rows, columns


def _plan(layout: Layout, count: int) -> list[tuple[Grid, Grid]]:
    """What becomes of each grid of tokens: its size and the size that survives, together at most `count` tokens."""
    frames, rows, columns = layout.grid
    if frames == len(layout.views):
        kept = min(frames, count)
        return [(layout.grid, (kept, *fit_grid(rows, columns, count // kept)))]
    shares = proportional(count, [view.rows * view.columns for view in layout.views])
    return [(_grid(view), _fit(view, share)) for view, share in zip(layout.views, shares, strict=True)]


def _grid(view: View) -> Grid:
    return 1, view.rows, view.columns


def _fit(view: View, share: int) -> Grid:
    return (1, *fit_grid(view.rows, view.columns, share)) if share else (0, 0, 0)


def _blocks(grid: Grid, kept: Grid, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The `K` blocks of one grid: where each stands `(K,)`, its places `(K, P)` and their shares in its mean."""
    anchor = torch.zeros(1, dtype=torch.long, device=device)  # (K,)
    source = torch.zeros(1, 1, dtype=torch.long, device=device)  # (K, P)
    weight = torch.ones(1, 1, dtype=torch.float32, device=device)  # (K, P)
    for size, blocks in zip(grid, kept, strict=True):
        place, share = _windows(size, blocks, device)  # (blocks, window) each
        anchor = (anchor[:, None] * size + centres(blocks, size, device)).flatten()
        source = (source[:, None, :, None] * size + place[:, None]).flatten(2).flatten(0, 1)
        weight = (weight[:, None, :, None] * share[:, None]).flatten(2).flatten(0, 1)
    return anchor, source, weight


def _windows(size: int, kept: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`(kept, window)` places of each block along one axis, and their shares in its mean, which sum to one.

    Blocks differ in length by one. The shorter ones repeat their last place with a share of zero.
    """
    block = torch.arange(kept, device=device)
    start, stop = block * size // kept, -(-(block + 1) * size // kept)
    longest = max(-(-(i + 1) * size // kept) - i * size // kept for i in range(kept))
    place = start[:, None] + torch.arange(longest, device=device)  # (kept, window)
    share = (place < stop[:, None]).float() / (stop - start)[:, None]
    return place.minimum(stop[:, None] - 1), share
