"""Choosing tokens: top-k, greedy diversity, even spreads. Pure, deterministic, and without host synchronisation.

Every function takes and returns tensors on the device it is given; sizes are Python ints, so no result of the device is
ever waited for. Ties go to the lowest index, on a CPU as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import normalize


def top_k(score: Tensor, k: int) -> Tensor:
    """Indices `(B, k)` of the largest scores of `(B, N)`, best first; equal scores go to the lowest index.

    `torch.topk` leaves the order of ties open on CUDA; a stable sort does not.
    """
    return score.sort(dim=1, descending=True, stable=True).indices[:, :k]


def unit(features: Tensor) -> Tensor:
    """`(B, N, D)` in float32 with rows of length one, so that dot products are cosines.

    A row that has no direction (zeros, or a value that is not finite) becomes zero: its cosine with every row is 0.
    """
    return normalize(features.detach().float(), dim=-1).nan_to_num_(0.0)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Keeps a caller's autocast away from matrix products, whose rounding would decide between near ties."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


def most_isolated(rows: Tensor, block: int = 512) -> Tensor:
    """`(B,)`: the row of `unit` rows `(B, N, D)` whose nearest other row is the farthest away.

    Works on `block` rows at a time, so that memory is `B * block * N`, not `B * N * N`.
    """
    nearest = []
    with full_precision(rows.device):
        for start in range(0, rows.shape[1], block):
            similarity = rows[:, start : start + block] @ rows.mT  # (B, block, N)
            similarity.diagonal(start, 1, 2).fill_(-torch.inf)  # a row is not its own neighbour
            nearest.append(similarity.amax(dim=2))
    return torch.cat(nearest, dim=1).argmin(dim=1)


def k_center(rows: Tensor, k: int, first: Tensor) -> Tensor:
    """Greedy k-center: `first` `(B,)`, then always the row farthest (in cosine) from its nearest chosen row.

    `rows` are `unit` rows `(B, N, D)`. Returns `(B, k)` distinct indices in the order of choice.
    """
    return _greedy(rows, k, first, torch.maximum)


def max_sum(rows: Tensor, k: int, first: Tensor) -> Tensor:
    """Greedy max-sum: `first` `(B,)`, then always the row whose summed cosine with all chosen rows is the smallest.

    `rows` are `unit` rows `(B, N, D)`. Returns `(B, k)` distinct indices in the order of choice.
    """
    return _greedy(rows, k, first, torch.add)


def centres(k: int, n: int, device: torch.device | None = None) -> Tensor:
    """`(k,)`: the middles of `k` equal parts of `n` places, `floor((u + 0.5) n / k)`; distinct while `k <= n`."""
    return (torch.arange(k, device=device) * 2 + 1) * n // max(2 * k, 1)


def others(index: Tensor, n: int) -> Tensor:
    """`(n - k,)`: the places in `[0, n)` that are not among the `k` distinct places `index`, ascending."""
    taken = torch.zeros(n, dtype=torch.uint8, device=index.device).index_fill_(0, index, 1)
    return taken.sort(stable=True).indices[: n - index.shape[0]]  # a sort, as `nonzero` waits for the device


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


def _greedy(rows: Tensor, k: int, first: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Start from `first` and keep adding the row with the lowest `join` of its cosines with the chosen rows.

    Costs one matrix-vector product per choice; no `N x N` matrix. Chosen rows cost infinity, so none is chosen twice.
    """
    chosen = [first]
    with full_precision(rows.device):
        cost = _cosine(rows, first).scatter_(1, first[:, None], torch.inf)  # (B, N)
        for _ in range(1, k):
            pick = cost.argmin(dim=1)  # (B,)
            chosen.append(pick)
            cost = join(cost, _cosine(rows, pick)).scatter_(1, pick[:, None], torch.inf)
    return torch.stack(chosen, dim=1)


def _cosine(rows: Tensor, pick: Tensor) -> Tensor:
    """`(B, N)`: cosine of every row with the picked one."""
    picked = rows.gather(1, pick[:, None, None].expand(-1, 1, rows.shape[2]))  # (B, 1, D)
    return (rows @ picked.mT).squeeze(2)


def _splitmix64(value: Tensor) -> Tensor:
    """The mixing function of the SplitMix64 generator on int64, whose products wrap around."""
    value = value + (0x9E3779B97F4A7C15 - 2**64)
    value = (value ^ _shift(value, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    value = (value ^ _shift(value, 27)) * (0x94D049BB133111EB - 2**64)
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's own repeats the sign."""
    return (value >> bits) & (2 ** (64 - bits) - 1)
