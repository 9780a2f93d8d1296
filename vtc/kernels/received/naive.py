"""Received attention in torch, blocked over queries."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.kernels.cosine import full_precision

BLOCK = 256  # rows of the attention map alive at a time


def received(query: Tensor, key: Tensor, offsets: Tensor | None, longest: int, scale: float, causal: bool) -> Tensor:
    """`(T,)`, of queries `(T, H, D)` and keys `(T, G, D)`; without offsets, all sequences are `longest` long.

    Sequences of different lengths are padded to the longest, by indices alone: their lengths are never read.
    """
    if offsets is None:
        return _padded(
            query.unflatten(0, (-1, longest)), key.unflatten(0, (-1, longest)), None, scale, causal
        ).flatten()
    starts, lengths = offsets[:-1, None].long(), offsets.diff()[:, None]  # (B, 1)
    place = torch.arange(longest, device=key.device)
    real = place < lengths  # (B, longest)
    place = torch.where(real, starts + place, 0)
    score = _padded(query[place], key[place], lengths, scale, causal)  # (B, longest)
    # Padding adds nothing to token 0, where it was sent.
    return score.new_zeros(key.shape[0]).scatter_add_(0, place.flatten(), score.where(real, 0.0).flatten())


def _padded(query: Tensor, key: Tensor, lengths: Tensor | None, scale: float, causal: bool) -> Tensor:
    """`(B, N)`, of `(B, N, H, D)` and `(B, N, G, D)`, of which the first `lengths` `(B, 1)` are real."""
    n, groups = key.shape[1:3]
    queries = query.float().unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # (B, G, H / G, N, D)
    keys = key.float().permute(0, 2, 3, 1)[:, :, None]  # (B, G, 1, D, N)
    place = torch.arange(n, device=key.device)
    real = None if lengths is None else place < lengths  # (B, N)
    total = torch.zeros(key.shape[0], n, dtype=torch.float32, device=key.device)
    with full_precision(key.device):
        for start in range(0, n, BLOCK):
            score = queries[..., start : start + BLOCK, :] @ keys * scale  # (B, G, H / G, BLOCK, N)
            if causal:
                score = score.masked_fill(place > place[start : start + BLOCK, None], -torch.inf)
            if real is not None:
                score = score.masked_fill(~real[:, None, None, None], -torch.inf)
            share = score.softmax(-1)
            if real is not None:
                share = share.where(real[:, None, None, start : start + BLOCK, None], 0.0)
            total += share.flatten(1, 2).mean(1).sum(1)
    return total / (n if lengths is None else lengths)
