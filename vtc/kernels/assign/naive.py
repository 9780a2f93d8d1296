"""Nearest-kept assignment in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.kernels.cosine import lengths, products, unit


def assign(rows: Tensor, keep: Tensor, euclidean: bool) -> Tensor:
    """See `vtc.kernels.assign.assign`."""
    rows = rows.float() if euclidean else unit(rows)
    kept = rows.gather(1, keep[..., None].expand(-1, -1, rows.shape[2]))  # (B, K, D)
    near = products(rows, kept)  # (B, N, K)
    if euclidean:  # |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2)
        near = near - lengths(kept).square()[:, None] / 2
    place = torch.arange(rows.shape[1], device=rows.device)
    return near.masked_fill(place[:, None] == keep[:, None], torch.inf).argmax(2)
