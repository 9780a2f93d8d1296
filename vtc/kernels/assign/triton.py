"""Nearest-kept assignment: one matrix product, then one kernel that scales, compares and reduces in a single pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels.cosine import lengths, products
from vtc.kernels.parts import OPTIONS, cosine, inverse


@triton.jit
def assign_kernel(near, length, keep, out, N, K, ROWS: tl.constexpr, SLOTS: tl.constexpr, EUCLIDEAN: tl.constexpr):
    """Grid (rows / ROWS, B). `near` (B, N, K) are dot products, `length` (B, N) those of all rows."""
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    length += b * N
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    where = tl.zeros((ROWS,), tl.int32)
    mine = inverse(tl.load(length + n, mask=n < N, other=0.0))
    for start in range(0, K, SLOTS):
        k = start + tl.arange(0, SLOTS)
        kept = tl.load(keep + b * K + k, mask=k < K, other=-1)  # -1 is no row, so padding is nobody's own place
        tile = tl.load(
            near + (b * N + n[:, None]) * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0
        )
        size = tl.load(length + kept, mask=k < K, other=0.0)
        score = (
            tile - (size * size * 0.5)[None, :] if EUCLIDEAN else cosine(tile, mine[:, None], inverse(size)[None, :])
        )
        score = tl.where((k < K)[None, :], score, float("-inf"))
        score = tl.where(n[:, None] == kept[None, :], float("inf"), score)
        highest, slot = tl.max(score, 1, return_indices=True)
        where = tl.where(highest > best, slot + start, where)
        best = tl.maximum(best, highest)
    tl.store(out + b * N + n, where.to(tl.int64), mask=n < N)


def assign(rows: Tensor, keep: Tensor, euclidean: bool) -> Tensor:
    """See `vtc.kernels.assign.assign`."""
    batch, n, width = rows.shape
    near = products(rows, rows.gather(1, keep[..., None].expand(-1, -1, width)))  # (B, N, K)
    out = torch.empty(batch, n, dtype=torch.long, device=rows.device)
    assign_kernel[(triton.cdiv(n, 8), batch)](
        near, lengths(rows), keep.contiguous(), out, n, keep.shape[1],
        ROWS=8, SLOTS=128, EUCLIDEAN=euclidean, num_warps=4, **OPTIONS,
    )  # fmt: skip
    return out
