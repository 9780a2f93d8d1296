"""Nearest-kept assignment: which survivor each token is most like."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.kernels.assign import naive
from vtc.kernels.dispatch import fused, operator


def assign(rows: Tensor, keep: Tensor, euclidean: bool = False) -> Tensor:
    """`(B, N)` int64: for each row of `(B, N, D)` the place in `keep` `(B, K)` of the kept row it is nearest to.

    Nearest is the largest cosine, or the smallest Euclidean distance; kept rows belong to themselves. Ties go to the
    first in `keep`.
    """
    return _assign(rows.detach(), keep, euclidean)


@operator(
    "assign(Tensor rows, Tensor keep, bool euclidean) -> Tensor",
    fake=lambda rows, keep, euclidean: rows.new_empty(rows.shape[:2], dtype=torch.long),
)
def _assign(rows: Tensor, keep: Tensor, euclidean: bool) -> Tensor:
    if fused(rows, keep):
        from vtc.kernels.assign import triton

        return triton.assign(rows, keep, euclidean)
    return naive.assign(rows, keep, euclidean)
