"""Greedy selection: k-center, max-sum, relevance-weighted k-center, and greedy MAP of a DPP.

Rows are features `(B, N, D)` of any floating type and any length: only their directions count. Ties go to the lowest
index, and no index is chosen twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.kernels.dispatch import fused, operator
from vtc.kernels.greedy import naive

# Rows of the N x N products are held in the registers of one program; and 8192 x 8192 products are 256 MB.
LONGEST = 8192
LONGEST_DPP = 4096  # rows of the Cholesky factor are held there too


def k_center(rows: Tensor, k: int, first: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """`(B, k)`: `first` `(B,)`, then always the row farthest (in cosine) from its nearest chosen row.

    Without `first`, the start is the row whose nearest other row is the farthest away. With a `weight` `(B, N)`, not
    negative, distances are multiplied with it: rows that are relevant *and* unlike the chosen ones come first.
    """
    return _greedy(rows.detach(), k, first, None if weight is None else weight.detach(), False)


def max_sum(rows: Tensor, k: int, first: Tensor | None = None) -> Tensor:
    """`(B, k)`: `first` `(B,)`, then always the row whose summed cosine with all chosen rows is the smallest."""
    return _greedy(rows.detach(), k, first, None, True)


def most_isolated(rows: Tensor, block: int = 512) -> Tensor:
    """`(B,)`: the row whose nearest other row, by cosine, is the farthest away.

    In torch, works on `block` rows at a time, so that memory is `B * block * N`, not `B * N * N`.
    """
    return _most_isolated(rows.detach(), block)


def dpp(rows: Tensor, relevance: Tensor, k: int) -> Tensor:
    """`(B, k)`: greedy MAP of the determinantal point process with the kernel `r_i cos_ij r_j`, `relevance` `(B, N)`.

    Once the chosen rows span the space, the others follow by index.
    """
    return _dpp(rows.detach(), relevance.detach(), k)


@operator(
    "greedy(Tensor rows, int k, Tensor? first, Tensor? weight, bool total) -> Tensor",
    fake=lambda rows, k, first, weight, total: rows.new_empty(rows.shape[0], k, dtype=torch.long),
)
def _greedy(rows: Tensor, k: int, first: Tensor | None, weight: Tensor | None, total: bool) -> Tensor:
    if fused(rows, first, weight) and rows.shape[1] <= LONGEST:
        from vtc.kernels.greedy import triton

        return triton.greedy(rows, k, first, weight, total)
    return naive.greedy(rows, k, first, weight, total)


@operator(
    "most_isolated(Tensor rows, int block) -> Tensor",
    fake=lambda rows, block: rows.new_empty(rows.shape[0], dtype=torch.long),
)
def _most_isolated(rows: Tensor, block: int) -> Tensor:
    if fused(rows) and rows.shape[1] <= LONGEST:
        from vtc.kernels.greedy import triton

        return triton.most_isolated(rows)
    return naive.most_isolated(rows, block)


@operator(
    "dpp(Tensor rows, Tensor relevance, int k) -> Tensor",
    fake=lambda rows, relevance, k: rows.new_empty(rows.shape[0], k, dtype=torch.long),
)
def _dpp(rows: Tensor, relevance: Tensor, k: int) -> Tensor:
    if fused(rows, relevance) and rows.shape[1] <= LONGEST_DPP:
        from vtc.kernels.greedy import triton

        return triton.dpp(rows, relevance, k)
    return naive.dpp(rows, relevance, k)
