"""Density-peak clustering: one matrix product, and two passes that hold whole rows of it in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels.cosine import gram
from vtc.kernels.parts import OPTIONS


@triton.jit
def _distances(products, length, b, i, N, P, scale, COLUMNS: tl.constexpr):
    """`(ROWS, COLUMNS)`: scaled squared distances of rows `i` to all rows."""
    j = tl.arange(0, COLUMNS)
    inside = (i < N)[:, None] & (j < P)[None, :]
    product = tl.load(products + (b * P + i[:, None]) * P + j[None, :], mask=inside, other=0.0)
    mine = tl.load(length + b * P + i, mask=i < N, other=0.0)
    other = tl.load(length + b * P + j, mask=j < P, other=0.0)
    distance = (mine * mine)[:, None] + (other * other)[None, :] - 2.0 * product
    return tl.where(i[:, None] == j[None, :], 0.0, tl.maximum(distance, 0.0) * scale), j


@triton.jit
def spread_kernel(
    products, length, out, N, P, scale, NEIGHBOURS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Grid (rows / ROWS, B): the mean of the `NEIGHBOURS` smallest distances, taken out one after the other."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    distance, j = _distances(products, length, b, i, N, P, scale, COLUMNS)
    distance = tl.where((j < N)[None, :], distance, float("inf"))
    total = tl.zeros((ROWS,), tl.float32)
    for _ in tl.static_range(NEIGHBOURS):
        nearest, place = tl.min(distance, 1, return_indices=True)
        total += nearest
        distance = tl.where(j[None, :] == place[:, None], float("inf"), distance)
    tl.store(out + b * N + i, total / NEIGHBOURS, mask=i < N)


@triton.jit
def peak_kernel(products, length, spread, out, N, P, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Grid (rows / ROWS, B): the logarithm of density times separation."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    distance, j = _distances(products, length, b, i, N, P, scale, COLUMNS)
    mine = tl.load(spread + b * N + i, mask=i < N, other=0.0)
    other = tl.load(spread + b * N + j, mask=j < N, other=float("inf"))
    denser = (other[None, :] < mine[:, None]) | ((other[None, :] == mine[:, None]) & (j[None, :] < i[:, None]))
    nearest = tl.min(tl.where(denser & (j < N)[None, :], distance, float("inf")), 1)
    farthest = tl.max(tl.where((j < N)[None, :], distance, 0.0), 1)
    nearest = tl.where(nearest == float("inf"), farthest, nearest)
    tl.store(out + b * N + i, tl.log(nearest) * 0.5 - mine, mask=i < N)


def density_peaks(rows: Tensor, neighbours: int) -> Tensor:
    """See `vtc.kernels.peaks`."""
    batch, n, width = rows.shape
    products, length = gram(rows)
    pitch = products.shape[2]
    spread, out = (torch.empty(batch, n, dtype=torch.float32, device=rows.device) for _ in range(2))
    columns = triton.next_power_of_2(pitch)
    tile = {"ROWS": max(1, min(4, 1024 // columns)), "COLUMNS": columns, "num_warps": 4 if columns <= 1024 else 8}
    grid = (triton.cdiv(n, tile["ROWS"]), batch)
    spread_kernel[grid](products, length, spread, n, pitch, 1.0 / width, NEIGHBOURS=neighbours, **tile, **OPTIONS)
    peak_kernel[grid](products, length, spread, out, n, pitch, 1.0 / width, **tile, **OPTIONS)
    return out
