"""Weighted merge in torch."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(x: Tensor, order: Tensor, ends: Tensor, source: Tensor, weight: Tensor) -> Tensor:
    """`(B, K, C)`. Slot `s` sums the entries `order[ends[s]]` to `order[ends[s + 1] - 1]`, one after the other.

    Not `scatter_add_`, whose sums come in any order on a GPU.
    """
    share, source = weight.gather(1, order).float(), source.gather(1, order)  # (B, E)
    rows = x.gather(1, source[..., None].expand(-1, -1, x.shape[2])).float() * share[..., None]  # (B, E, C)
    return torch.segment_reduce(rows, "sum", offsets=ends, axis=1, unsafe=True, initial=0.0).to(x.dtype)
