"""Greedy selection in torch: one matrix-vector product per choice, or a row of all cosines while they are few."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.kernels.cosine import full_precision, unit

WHOLE = 2**24  # cosines that are kept once they are known: those of 4096 tokens, 64 MB
RANK = 1e-6  # of a row's own gain: below this, what float32 leaves of it is rounding


def most_isolated(rows: Tensor, block: int = 512) -> Tensor:
    """`(B,)`: the row of `(B, N, D)` whose nearest other row, by cosine, is the farthest away.

    Works on `block` rows at a time, so that memory is `B * block * N`, not `B * N * N`.
    """
    rows, nearest = unit(rows), []
    with full_precision(rows.device):
        for start in range(0, rows.shape[1], block):
            similarity = rows[:, start : start + block] @ rows.mT  # (B, block, N)
            similarity.diagonal(start, 1, 2).fill_(-torch.inf)  # a row is not its own neighbour
            nearest.append(similarity.amax(dim=2))
    return torch.cat(nearest, dim=1).argmin(dim=1)


def all_cosines(rows: Tensor, block: int = 512) -> Tensor:
    """`(B, N, N)` of rows `(B, N, D)` of length one: one half is computed, the other is the same."""
    batch, n = rows.shape[:2]
    cosine = rows.new_empty(batch, n, n)
    with full_precision(rows.device):
        for start in range(0, n, block):
            stop = start + block
            part = rows[:, start:stop] @ rows[:, start:].mT  # (B, block, N - start)
            cosine[:, start:stop, start:] = part
            cosine[:, stop:, start:stop] = part[:, :, block:].mT
    return cosine


def greedy(rows: Tensor, k: int, first: Tensor | None, weight: Tensor | None, total: bool) -> Tensor:
    """Keep adding the row of `(B, N, D)` that is least like those chosen before; `(B, k)` in the order of choice.

    How alike is the cosine with the most similar chosen row, or with `total` the sum of the cosines with all of them.
    With a weight `(B, N)`, the row with the largest `weight * (1 - cosine)` is added.
    """
    whole = None
    if first is None and rows.shape[1] ** 2 <= WHOLE:
        if len(rows) > 1:  # one after the other: less memory at a time, and each as if it were alone
            weights = [None] * len(rows) if weight is None else weight[:, None]
            return torch.cat([greedy(row[None], k, None, own, total) for row, own in zip(rows, weights, strict=True)])
        rows = unit(rows)
        whole = all_cosines(rows)
        whole.diagonal(0, 1, 2).fill_(-torch.inf)  # a row is not its own neighbour, and never chosen again
        first = whole.amax(dim=2).argmin(dim=1)
    else:
        first = most_isolated(rows) if first is None else first
        rows = unit(rows)
    pick, chosen = first, [first]
    taken = torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device)
    share = None if weight is None else weight.float().nan_to_num(0.0, 0.0, 0.0)
    with full_precision(rows.device):
        alike = _cosine(rows, first, whole)  # (B, N)
        for _ in range(1, k):
            taken = taken.scatter(1, pick[:, None], True)
            cost = alike if share is None else share * (alike.clamp_max(1.0) - 1.0)
            pick = cost.masked_fill(taken, torch.inf).argmin(dim=1)  # (B,)
            chosen.append(pick)
            cosine = _cosine(rows, pick, whole)
            alike = alike + cosine if total else alike.maximum(cosine)
    return torch.stack(chosen, dim=1)


def dpp(rows: Tensor, relevance: Tensor, k: int) -> Tensor:
    """Greedy MAP of a determinantal point process over `(B, N, D)`; `(B, k)` in the order of choice.

    The kernel is `L_ij = r_i cos_ij r_j`. Each choice is the row with the largest gain: what is left of its own `L_ii`
    after projecting out the rows chosen before. Their orthogonal directions are the rows of a Cholesky factor.
    """
    unscaled, share = unit(rows), relevance.float().nan_to_num(0.0, 0.0, 0.0)
    own = share.square() * unscaled.any(dim=2)  # (B, N): the diagonal of L
    scaled = unscaled * share[..., None]
    batch, n = own.shape
    factor = own.new_empty(batch, k, n)
    gain, taken, chosen = own, torch.zeros_like(own, dtype=torch.bool), []
    with full_precision(rows.device):
        for step in range(k):
            pick = gain.masked_fill(taken, -torch.inf).argmax(dim=1, keepdim=True)  # (B, 1)
            taken = taken.scatter(1, pick, True)
            chosen.append(pick)
            past = factor[:, :step]  # (B, step, N)
            mixing = past.gather(2, pick[:, None].expand(-1, step, -1)).mT  # (B, 1, step)
            row = _cosine(scaled, pick[:, 0]) - (mixing @ past)[:, 0]  # (B, N)
            left = gain.gather(1, pick)
            factor[:, step] = row = torch.where(left > 0.0, row * left.rsqrt(), 0.0)
            gain = gain - row.square()
            gain = torch.where(gain > RANK * own, gain, 0.0)
    return torch.cat(chosen, dim=1)


def _cosine(rows: Tensor, pick: Tensor, whole: Tensor | None = None) -> Tensor:
    """`(B, N)`: dot product of every row with the picked one; `whole` has them all, if they are known."""
    if whole is not None:
        return whole.gather(1, pick[:, None, None].expand(-1, 1, whole.shape[2])).squeeze(1)
    picked = rows.gather(1, pick[:, None, None].expand(-1, 1, rows.shape[2]))  # (B, 1, D)
    return (rows @ picked.mT).squeeze(2)
