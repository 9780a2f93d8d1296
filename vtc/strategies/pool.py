"""`pool`: the baseline that averages neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtc.compressor import Compressor, register
from vtc.errors import UnsupportedModelError
from vtc.select import centres, fit_grid
from vtc.selection import Selection
from vtc.visual import Layout, Visual


@register("pool")
@dataclass(kw_only=True)
class Pool(Compressor):
    """Average the tokens over an even grid of blocks: nothing is dropped, everything is blurred.

    Each frame of `H x W` tokens becomes the `h x w` of about the same aspect that fits into its share of the budget
    (`vtc.select.fit_grid`). Blocks are those of `torch.nn.functional.adaptive_avg_pool2d`, which overlap by a token
    where sizes do not divide. The budget is a ceiling here: `T h w` tokens survive, which can be somewhat fewer than
    `keep` asks for. With fewer tokens to keep than frames, neighbouring frames are averaged too.

    The features that are averaged are the projected ones, which the language model would have received; pooling before
    the projector would feed it inputs of a kind that it never saw. A survivor stands in the middle of its block.

    Positions are contiguous by default, as for the other strategies that act before the language model.
    """

    positions: Literal["original", "contiguous"] = "contiguous"

    def budget(self, layout: Layout) -> int:
        frames, rows, columns = self._shape(layout)
        return frames * rows * columns

    def select(self, visual: Visual) -> Selection:
        batch, device = visual.inputs, visual.device
        anchor = torch.zeros(1, dtype=torch.long, device=device)  # (K,)
        source = torch.zeros(1, 1, dtype=torch.long, device=device)  # (K, E / K)
        weight = torch.ones(1, 1, device=device)  # (K, E / K)
        for size, kept in zip(visual.layout.grid, self._shape(visual.layout), strict=True):
            place, share = _windows(size, kept, device)  # (kept, window) each
            anchor = (anchor[:, None] * size + centres(kept, size, device)).flatten()
            source = (source[:, None, :, None] * size + place[:, None]).flatten(2).flatten(0, 1)
            weight = (weight[:, None, :, None] * share[:, None]).flatten(2).flatten(0, 1)
        slot = torch.arange(anchor.shape[0], device=device)[:, None].expand_as(source)
        entries = (entry.flatten().expand(batch, -1) for entry in (slot, source, weight))
        return Selection(anchor.expand(batch, -1), visual.layout.tokens, *entries)

    def _shape(self, layout: Layout) -> tuple[int, int, int]:
        """`(frames, rows, columns)` that survive."""
        frames, rows, columns = layout.grid
        if frames * rows * columns != layout.tokens:
            raise UnsupportedModelError(
                f"pool needs tokens that fill a grid, but this input has {layout.tokens} tokens on a grid of "
                f"{frames} x {rows} x {columns} (several crops, or separators); 'uniform' does without a grid"
            )
        count = super().budget(layout)
        kept = min(frames, count)
        return kept, *fit_grid(rows, columns, count // kept)


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
