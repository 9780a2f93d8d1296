"""Density-peak clustering: centres are rows in dense places, far from any denser one."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.kernels.dispatch import fused, operator
from vtc.kernels.peaks import naive

LONGEST = 4096  # rows of the N x N distances are held in the registers of one program


def density_peaks(rows: Tensor, k: int, neighbours: int = 7) -> Tensor:
    """`(B, k)` int64: the centres among the rows `(B, N, D)`, best first.

    The distance of two rows is Euclidean, over the square root of `D`. A row's density is `exp(-m)`, where `m` is the
    mean of the squared distances to its `neighbours` nearest rows, itself included; its separation is the distance to
    the nearest denser row, and the largest of its distances for the densest row. Centres have the largest product of
    the two. Of two rows of equal density the one with the lower index counts as denser, and comes first.
    """
    score = _density_peaks(rows.detach(), min(neighbours, rows.shape[1]))
    return score.sort(dim=1, descending=True, stable=True).indices[:, :k]


@operator(
    "density_peaks(Tensor rows, int neighbours) -> Tensor",
    fake=lambda rows, neighbours: rows.new_empty(rows.shape[:2], dtype=torch.float32),
)
def _density_peaks(rows: Tensor, neighbours: int) -> Tensor:
    """`(B, N)`: the logarithm of density times separation, which orders rows even where densities underflow."""
    if fused(rows) and rows.shape[1] <= LONGEST and neighbours <= 16:
        from vtc.kernels.peaks import triton

        return triton.density_peaks(rows, neighbours)
    return naive.density_peaks(rows, neighbours)
