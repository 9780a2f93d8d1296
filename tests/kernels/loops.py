"""What the kernels compute, written from the definitions in float64, one entry after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Table = list[list[float]]


def cosines(x: Tensor) -> Table:
    """All cosines of `(N, D)`; 0 for rows without a direction."""
    rows = x.double()
    length = rows.norm(dim=1, keepdim=True)
    unit = torch.where(length.isfinite() & (length > 0), rows / length, 0.0)
    table = unit @ unit.T
    return table.where(~torch.eye(len(x), dtype=torch.bool) | (table == 0), 1.0).tolist()


def distances(x: Tensor) -> Table:
    rows = x.double()
    return (rows[:, None] - rows).norm(dim=2).tolist()


def most_isolated(x: Tensor) -> int:
    table, n = cosines(x), len(x)
    nearest = [max((table[i][j] for j in range(n) if j != i), default=-1.0) for i in range(n)]
    return min(range(n), key=lambda i: (nearest[i], i))


def greedy(
    x: Tensor, k: int, first: int, join: Callable[[Sequence[float]], float], weight: Sequence[float] | None = None
) -> list[int]:
    table, order = cosines(x), [first]
    while len(order) < k:
        cost = {i: join([table[i][j] for j in order]) for i in range(len(x)) if i not in order}
        if weight is not None:
            cost = {i: -weight[i] * (1 - value) for i, value in cost.items()}
        order.append(min(cost, key=lambda i: (cost[i], i)))
    return order


def dpp(x: Tensor, relevance: Tensor, k: int) -> list[int]:
    """By determinants: each choice is the row that makes the determinant of the chosen block of the kernel largest."""
    table = torch.tensor(cosines(x), dtype=torch.float64)
    kernel = relevance.double()[:, None] * table * relevance.double()
    order: list[int] = []
    for _ in range(k):
        free = [i for i in range(len(x)) if i not in order]
        volume = {i: kernel[[*order, i]][:, [*order, i]].logdet().item() for i in free}
        order.append(max(volume, key=lambda i: (volume[i], -i)))
    return order


def attention(query: Tensor, key: Tensor, scale: float, seen: Tensor) -> Tensor:
    """`(H, M, N)` float64, of queries `(M, H, D)` and keys `(N, G, D)`; `seen` `(M, N)` says who sees whom."""
    heads, groups = query.shape[1], key.shape[1]
    out = torch.zeros(heads, len(query), len(key), dtype=torch.float64)
    for h in range(heads):
        score = query[:, h].double() @ key[:, h * groups // heads].double().T * scale
        out[h] = score.masked_fill(~seen, -math.inf).softmax(1).nan_to_num()
    return out


def received(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    """`(N,)` of one sequence."""
    n = len(key)
    seen = torch.ones(n, n, dtype=torch.bool)
    return attention(query, key, scale, seen.tril() if causal else seen).mean(dim=(0, 1))


def assign(x: Tensor, keep: list[int], euclidean: bool) -> list[int]:
    table = [[-d for d in row] for row in distances(x)] if euclidean else cosines(x)
    return [
        keep.index(i) if i in keep else max(range(len(keep)), key=lambda s: (table[i][keep[s]], -s))
        for i in range(len(x))
    ]


def merge(x: Tensor, slot: Tensor, source: Tensor, weight: Tensor, kept: int) -> Tensor:
    out = torch.zeros(kept, x.shape[1], dtype=torch.float64)
    for s, n, w in zip(slot.tolist(), source.tolist(), weight.double().tolist(), strict=True):
        out[s] += w * x[n].double()
    return out


def density_peaks(x: Tensor, k: int, neighbours: int) -> list[int]:
    n = len(x)
    distance = [[d / math.sqrt(x.shape[1]) for d in row] for row in distances(x)]
    spread = [sum(d * d for d in sorted(row)[:neighbours]) / neighbours for row in distance]
    score = []
    for i in range(n):
        denser = [j for j in range(n) if (spread[j], j) < (spread[i], i)]
        separation = min(distance[i][j] for j in denser) if denser else max(distance[i])
        score.append(math.exp(-spread[i]) * separation)
    return sorted(range(n), key=lambda i: (-score[i], i))[:k]
