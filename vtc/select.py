"""Choosing tokens: top-k, greedy diversity, even spreads. Pure, deterministic, and without host synchronisation.

Every function takes and returns tensors on the device it is given; sizes are Python ints, so no result of the device is
ever waited for. Ties go to the lowest index, on a CPU as on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from vtc.kernels import density_peaks, dpp, k_center, max_sum, most_isolated
from vtc.kernels.cosine import full_precision, unit
from vtc.visual import Layout, View

__all__ = [
    "centres",
    "density_peaks",
    "distinct",
    "dpp",
    "fit_grid",
    "full_precision",
    "k_center",
    "max_sum",
    "most_isolated",
    "others",
    "places",
    "proportional",
    "rank",
    "separators",
    "shuffled",
    "thumbnail",
    "top_k",
    "unit",
]


def top_k(score: Tensor, k: int) -> Tensor:
    """Indices `(B, k)` of the largest scores of `(B, N)`, best first; equal scores go to the lowest index.

    `torch.topk` leaves the order of ties open on CUDA; a stable sort does not.
    """
    return score.sort(dim=1, descending=True, stable=True).indices[:, :k]


def rank(score: Tensor) -> Tensor:
    """`(..., N)`: the place of each score among those of its row, 0 for the largest; ties go to the lowest index."""
    order = score.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(order).scatter_(
        -1, order, torch.arange(score.shape[-1], device=score.device).expand_as(order)
    )


def centres(k: int, n: int, device: torch.device | None = None) -> Tensor:
    """`(k,)`: the middles of `k` equal parts of `n` places, `floor((u + 0.5) n / k)`; distinct while `k <= n`."""
    return (torch.arange(k, device=device) * 2 + 1) * n // max(2 * k, 1)


def others(index: Tensor, n: int) -> Tensor:
    """`(n - k,)`: the places in `[0, n)` that are not among the `k` distinct places `index`, ascending."""
    taken = torch.zeros(n, dtype=torch.uint8, device=index.device).index_fill_(0, index, 1)
    return taken.sort(stable=True).indices[: n - index.shape[0]]  # a sort, as `nonzero` waits for the device


def places(views: Sequence[View], device: torch.device | None = None) -> Tensor:
    """Numbers of the tokens of `views` in their visual input, without separators: view by view, in raster order."""
    grids = [
        torch.arange(view.start, view.stop, device=device).view(view.rows, -1)[:, : view.columns].flatten()
        for view in views
    ]
    return torch.cat(grids)


def separators(layout: Layout, device: torch.device | None = None) -> Tensor:
    """Numbers of the tokens of `layout` that belong to no grid, such as newlines, ascending."""
    return others(places(layout.views, device), layout.tokens)


def thumbnail(layout: Layout) -> View | None:
    """The view of an image that shows all of it, if a canvas of its crops is the other; `None` of tiles and clips."""
    if layout.clip or len(layout.views) != 2:
        return None
    whole, canvas = layout.views
    return whole if canvas.separators or canvas.crops != (1, 1) else None


def proportional(total: int, sizes: Sequence[int]) -> list[int]:
    """`total <= sum(sizes)` in whole parts proportional to `sizes`: rounded down, then the largest remainders get one
    more each, the first among equals."""
    whole = sum(sizes)
    parts = [total * size // whole for size in sizes]
    first = sorted(range(len(sizes)), key=lambda i: -(total * sizes[i] % whole))
    for i in first[: total - sum(parts)]:
        parts[i] += 1
    return parts


def distinct(layout: Layout, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """`(n,)` and `(r,)`: tokens of a layout that differ, ascending, and the separators that only repeat the first one.

    Separators are copies, but their dot products with other tokens are not: the last bit depends on where they stand.
    """
    if layout.tokens - sum(view.rows * view.columns for view in layout.views) < 2:
        every = torch.arange(layout.tokens, device=device)
        return every, every[:0]
    breaks = separators(layout, device)
    return others(breaks[1:], layout.tokens), breaks[1:]


def fit_grid(rows: int, columns: int, k: int) -> tuple[int, int]:
    """The grid of at most `k >= 1` cells, inside `rows` x `columns`, to which no row and no column can be added.

    Of several such grids: the one whose aspect is closest to `rows / columns`, then the largest, then the lowest.
    """
    best: tuple[Fraction, int, int, int] | None = None
    for height in range(1, min(rows, k) + 1):
        width = min(columns, k // height)
        if height < rows and (height + 1) * width <= k:
            continue  # another row fits
        wide, tall = width * rows, height * columns
        rank = (Fraction(max(wide, tall), min(wide, tall)), -height * width, height, width)
        best = rank if best is None else min(best, rank)
    assert best is not None
    return best[2], best[3]


def shuffled(n: int, seed: int, device: torch.device | None = None) -> Tensor:
    """`(n,)`: a permutation of the `n` places that depends on `seed` and `n` alone, the same on every device.

    Places are sorted by a 64-bit hash. The hash is a bijection, so there are no ties.
    """
    signed = (seed + 2**63) % 2**64 - 2**63
    key = _splitmix64(_splitmix64(torch.full((1,), signed, device=device)) + n)
    return _splitmix64(key + torch.arange(n, device=device)).argsort()


def _splitmix64(value: Tensor) -> Tensor:
    """The mixing function of the SplitMix64 generator on int64, whose products wrap around."""
    value = value + (0x9E3779B97F4A7C15 - 2**64)
    value = (value ^ _shift(value, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    value = (value ^ _shift(value, 27)) * (0x94D049BB133111EB - 2**64)
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's own repeats the sign."""
    return (value >> bits) & (2 ** (64 - bits) - 1)
