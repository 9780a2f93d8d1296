"""Density-peak clustering in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.kernels.cosine import lengths, products


def density_peaks(rows: Tensor, neighbours: int) -> Tensor:
    """See `vtc.kernels.peaks`."""
    square = lengths(rows).square()
    distance = square[:, :, None] + square[:, None] - 2 * products(rows, rows)  # (B, N, N), squared
    distance.diagonal(dim1=1, dim2=2).zero_()
    distance = distance.clamp_min(0) / rows.shape[2]
    spread = distance.topk(neighbours, dim=2, largest=False).values.mean(2)  # (B, N): minus the log of the density
    place = torch.arange(rows.shape[1], device=rows.device)
    denser = spread[:, None] < spread[:, :, None]  # (B, N, N): column denser than row
    denser |= (spread[:, None] == spread[:, :, None]) & (place < place[:, None])
    nearest = distance.masked_fill(~denser, torch.inf).amin(2)
    nearest = torch.where(nearest.isinf(), distance.amax(2), nearest)
    return nearest.log() / 2 - spread
