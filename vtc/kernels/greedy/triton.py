"""Greedy selection as one launch per batch.

All dot products come from one matrix product, of the features as they are. Then one program per visual input walks
through its choices, with everything it has to remember in registers: per step it reads one row of the products and
reduces it to one index. Programs share nothing and wait for nobody.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels.cosine import gram
from vtc.kernels.greedy.naive import RANK
from vtc.kernels.parts import OPTIONS, cosine, inverse, lowest


@triton.jit
def nearest_kernel(products, length, nearest, N, P, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Grid (rows / ROWS, B): each row's cosine with the most similar other row."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    length += b * P
    mine = inverse(tl.load(length + i, mask=i < N, other=0.0))
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in range(0, N, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        inside = (i < N)[:, None] & (j < P)[None, :]
        tile = tl.load(products + (b * P + i[:, None]) * P + j[None, :], mask=inside, other=0.0)
        near = cosine(tile, mine[:, None], inverse(tl.load(length + j, mask=j < P, other=0.0))[None, :])
        near = tl.where((i[:, None] == j[None, :]) | (j >= N)[None, :], float("-inf"), near)
        best = tl.maximum(best, tl.max(near, 1))
    tl.store(nearest + b * N + i, best, mask=i < N)


@triton.jit
def greedy_kernel(
    products, length, start, weight, out, N, P, K,
    BLOCK: tl.constexpr, TOTAL: tl.constexpr, ISOLATED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Grid (B,). `start` is the first choice (B,), or with ISOLATED what `nearest_kernel` found (B, N)."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    products += b * P * P
    length += b * P
    out += b * K
    scale = inverse(tl.load(length + n, mask=n < P, other=0.0))
    if WEIGHTED:
        share = tl.load(weight + b * N + n, mask=n < N, other=0.0).to(tl.float32)
        share = tl.where(tl.abs(share) < float("inf"), share, 0.0)
    if ISOLATED:
        pick = lowest(tl.load(start + b * N + n, mask=n < N, other=float("inf")), n)
    else:
        pick = tl.load(start + b).to(tl.int32)
    tl.store(out, pick.to(tl.int64))
    alike = tl.where(n < N, 0.0 if TOTAL else -2.0, float("inf"))  # infinity: padding, and what is chosen
    for step in range(1, K):
        row = tl.load(products + pick.to(tl.int64) * P + n, mask=n < P, other=0.0)
        near = cosine(row, scale, inverse(tl.load(length + pick)))
        alike = alike + near if TOTAL else tl.maximum(alike, near)
        alike = tl.where(n == pick, float("inf"), alike)
        cost = alike
        if WEIGHTED:
            cost = tl.where(alike < 1e30, share * (tl.minimum(alike, 1.0) - 1.0), float("inf"))
        pick = lowest(cost, n)
        tl.store(out + step, pick.to(tl.int64))


@triton.jit
def dpp_kernel(
    products, length, relevance, factor, out, N, P, K, RANK: tl.constexpr, BLOCK: tl.constexpr, PAST: tl.constexpr
):
    """Grid (B,). `factor` (B, K, P) is scratch: the rows of the Cholesky factor, one more per step."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    inside = n < P
    products += b * P * P
    length += b * P
    factor += b * K * P
    out += b * K
    scale = inverse(tl.load(length + n, mask=inside, other=0.0))
    share = tl.load(relevance + b * N + n, mask=n < N, other=0.0).to(tl.float32)
    share = tl.where(tl.abs(share) < float("inf"), share, 0.0)
    own = tl.where(scale > 0.0, share * share, 0.0)
    gain = tl.where(n < N, own, float("-inf"))
    for step in range(0, K):
        pick = lowest(-gain, n)
        tl.store(out + step, pick.to(tl.int64))
        left = tl.sum(tl.where(n == pick, gain, 0.0), 0)
        other = tl.sum(tl.where(n == pick, share, 0.0), 0)
        row = tl.load(products + pick.to(tl.int64) * P + n, mask=inside, other=0.0)
        row = cosine(row, scale, inverse(tl.load(length + pick))) * share * other
        for before in range(0, step, PAST):
            t = before + tl.arange(0, PAST)
            mixing = tl.load(factor + t * P + pick, mask=t < step, other=0.0)
            past = tl.load(factor + t[:, None] * P + n[None, :], mask=(t < step)[:, None] & inside[None, :], other=0.0)
            row -= tl.sum(past * mixing[:, None], 0)
        row = tl.where(left > 0.0, row * tl.rsqrt(left), 0.0)
        tl.store(factor + step * P + n, row, mask=inside)
        after = gain - row * row
        after = tl.where(after > RANK * own, after, 0.0)
        gain = tl.where((gain == float("-inf")) | (n == pick), float("-inf"), after)  # padding, and what is chosen
        tl.debug_barrier()  # the next steps read this row of the factor in other threads


def greedy(rows: Tensor, k: int, first: Tensor | None, weight: Tensor | None, total: bool) -> Tensor:
    """See `vtc.kernels.greedy.naive.greedy`."""
    batch, n, _ = rows.shape
    products, length = gram(rows)
    pitch = products.shape[2]
    start = _nearest(products, length, n) if first is None else first.contiguous()
    out = torch.empty(batch, k, dtype=torch.long, device=rows.device)
    greedy_kernel[(batch,)](
        products, length, start, start if weight is None else weight.contiguous(), out, n, pitch, k,
        BLOCK=triton.next_power_of_2(pitch), TOTAL=total, ISOLATED=first is None, WEIGHTED=weight is not None,
        num_warps=_warps(pitch), **OPTIONS,
    )  # fmt: skip
    return out


def most_isolated(rows: Tensor) -> Tensor:
    """See `vtc.kernels.greedy.naive.most_isolated`."""
    return _nearest(*gram(rows), rows.shape[1]).argmin(dim=1)


def dpp(rows: Tensor, relevance: Tensor, k: int) -> Tensor:
    """See `vtc.kernels.greedy.naive.dpp`."""
    batch, n, _ = rows.shape
    products, length = gram(rows)
    pitch = products.shape[2]
    factor = torch.empty(batch, k, pitch, dtype=torch.float32, device=rows.device)
    out = torch.empty(batch, k, dtype=torch.long, device=rows.device)
    dpp_kernel[(batch,)](
        products, length, relevance.contiguous(), factor, out, n, pitch, k,
        RANK=RANK, BLOCK=triton.next_power_of_2(pitch), PAST=8, num_warps=_warps(pitch), **OPTIONS,
    )  # fmt: skip
    return out


def _nearest(products: Tensor, length: Tensor, n: int) -> Tensor:
    batch, pitch = length.shape
    nearest = torch.empty(batch, n, dtype=torch.float32, device=length.device)
    nearest_kernel[(triton.cdiv(n, 4), batch)](
        products, length, nearest, n, pitch, ROWS=4, COLUMNS=256, num_warps=4, **OPTIONS
    )
    return nearest


def _warps(n: int) -> int:
    """Few threads wait for each other less; many are needed to hold a long row in registers."""
    return 1 if n <= 256 else 4 if n <= 1024 else 8 if n <= 4096 else 32
