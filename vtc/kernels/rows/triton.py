"""Query-row scores in two launches: keys are read once, for all the query heads and rows they serve.

The first kernel writes scores and, per tile of keys, the maximum and the sum of the softmax; the second puts the tiles
together and averages over heads. No atomics: the sums are the same in every run.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels.parts import OPTIONS, aligned

TILE = 64


@triton.jit
def score_kernel(
    query, key, mask, score, top, total, N, TILES, R, scale, sqb, sqr, sqh, skb, skn, skh,
    H: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of keys, key heads, B). Scores are in units of log 2, `(B, R, H, N)`. Strides count 8 elements."""
    tile = tl.program_id(0)
    b = tl.program_id(2).to(tl.int64)
    n = tile * TILE + tl.arange(0, TILE)
    d = tl.arange(0, WIDTH)
    key += (b * skb + tl.program_id(1).to(tl.int64) * skh) * 8
    keys = tl.load(
        key + n[:, None].to(tl.int64) * skn * 8 + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0.0
    ).to(tl.float32)  # (TILE, WIDTH)
    taking = n < N
    if MASKED:
        taking = taking & (tl.load(mask + b * N + n, mask=taking, other=0) != 0)
    for r in range(0, R):
        for g in tl.static_range(SHARED):
            h = tl.program_id(1).to(tl.int64) * SHARED + g
            row = tl.load(query + (b * sqb + r * sqr + h * sqh) * 8 + d, mask=d < D, other=0.0)
            s = tl.sum(keys * row.to(tl.float32)[None, :], 1) * scale
            s = tl.where(taking, s, float("-inf"))
            highest = tl.max(s, 0)
            finite = tl.where(highest > float("-inf"), highest, 0.0)
            place = (b * R + r) * H + h
            tl.store(score + place * N + n, s, mask=n < N)
            tl.store(top + place * TILES + tile, highest)
            tl.store(total + place * TILES + tile, tl.sum(tl.exp2(s - finite), 0))


@triton.jit
def average_kernel(
    score, top, total, out, N, TILES, H: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr
):
    """Grid (tiles of keys, B * R): softmax over all tiles, mean over heads."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    h = tl.arange(0, HEADS)
    t = tl.arange(0, PARTS)
    heads = h < H
    highest = tl.full((HEADS,), float("-inf"), tl.float32)
    for first in range(0, TILES, PARTS):
        part = (row * H + h[:, None]) * TILES + first + t[None, :]
        valid = heads[:, None] & (first + t < TILES)[None, :]
        highest = tl.maximum(highest, tl.max(tl.load(top + part, mask=valid, other=float("-inf")), 1))
    highest = tl.maximum(highest, -1e38)  # if nothing is seen, no infinity is subtracted from itself
    whole = tl.zeros((HEADS,), tl.float32)
    for first in range(0, TILES, PARTS):
        part = (row * H + h[:, None]) * TILES + first + t[None, :]
        valid = heads[:, None] & (first + t < TILES)[None, :]
        tops = tl.load(top + part, mask=valid, other=float("-inf"))
        whole += tl.sum(tl.load(total + part, mask=valid, other=0.0) * tl.exp2(tops - highest[:, None]), 1)
    whole = tl.maximum(whole, 1.0)  # which the largest score alone contributes, if there is one
    inside = heads[:, None] & (n < N)[None, :]
    s = tl.load(score + (row * H + h[:, None]) * N + n[None, :], mask=inside, other=float("-inf"))
    share = tl.exp2(s - highest[:, None]) / whole[:, None]
    tl.store(out + row * N + n, tl.sum(share, 0) / H, mask=n < N)


def query_rows(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """See `vtc.kernels.rows.query_rows`."""
    query, key = aligned(query), aligned(key)
    batch, rows, heads, width = query.shape
    n, groups = key.shape[1:3]
    tiles = triton.cdiv(n, TILE)
    score, top, total = (
        torch.empty(batch, rows, heads, m, dtype=torch.float32, device=query.device) for m in (n, tiles, tiles)
    )
    out = torch.empty(batch, rows, n, dtype=torch.float32, device=query.device)
    score_kernel[(tiles, groups, batch)](
        query, key, score if mask is None else mask.contiguous(), score, top, total, n, tiles, rows,
        scale * math.log2(math.e), *(s // 8 for s in query.stride()[:3]), *(s // 8 for s in key.stride()[:3]),
        H=heads, SHARED=heads // groups, D=width, WIDTH=triton.next_power_of_2(width), MASKED=mask is not None,
        TILE=TILE, num_warps=4, **OPTIONS,
    )  # fmt: skip
    average_kernel[(tiles, batch * rows)](
        score, top, total, out, n, tiles, H=heads, HEADS=triton.next_power_of_2(heads),
        PARTS=16, TILE=TILE, num_warps=4, **OPTIONS,
    )  # fmt: skip
    return out
