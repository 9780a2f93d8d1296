"""Received attention in torch, blocked over queries."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.kernels.cosine import full_precision

# Entries of the attention map alive at a time: as many as stay in a processor's cache; more where steps are launches.
ALIVE_IN_CACHE, ALIVE = 2**20, 2**26
BLOCK = 256  # rows of it at most


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
    batch, n, groups = key.shape[:3]
    heads = query.shape[2]
    alive = ALIVE if key.is_cuda else ALIVE_IN_CACHE
    together, rows = max(1, alive // (heads * n * n)), max(1, min(BLOCK, alive // (heads * n)))
    place = torch.arange(n, device=key.device)
    total = torch.zeros(batch, n, dtype=torch.float32, device=key.device)
    for b in range(0, batch, together):
        part = slice(b, b + together)
        # Query heads that share a key head stand together: (b, G, H / G, N, D) and (b, G, D, N)
        queries = (query[part].float() * scale).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
        keys = key[part].float().permute(0, 2, 3, 1).contiguous()
        real = None if lengths is None else place < lengths[part]  # (b, N)
        for start in range(0, n, rows):
            block = queries[..., start : start + rows, :]
            with full_precision(key.device):
                score = (block.flatten(2, 3) @ keys).view(*block.shape[:-1], n)  # (b, G, H / G, rows, N)
            if causal:
                score.masked_fill_(place > place[start : start + rows, None], -torch.inf)
            if real is not None:
                score.masked_fill_(~real[:, None, None, None], -torch.inf)
            # A softmax whose rows are divided by their sums only when they are added up.
            score = score.sub_(score.amax(-1, keepdim=True)).exp_().flatten(2, 3)
            share = 1 / score.sum(-1)  # (b, G, H / G * rows)
            if real is not None:
                asks = real[:, None, None, start : start + rows].expand(block.shape[:-1]).flatten(2)
                share = share.where(asks, 0.0)
            with full_precision(key.device):
                total[part] += (share[:, :, None] @ score)[:, :, 0].sum(1)
    return total / (heads * (n if lengths is None else lengths))
