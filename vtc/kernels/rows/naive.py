"""Query-row scores in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.kernels.cosine import full_precision


def query_rows(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """See `vtc.kernels.rows.query_rows`."""
    groups = key.shape[2]
    grouped = query.float().unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # (B, G, H / G, R, D)
    keys = key.float().permute(0, 2, 3, 1)[:, :, None]  # (B, G, 1, D, N)
    with full_precision(query.device):
        score = grouped @ keys * scale  # (B, G, H / G, R, N)
    if mask is not None:
        score = score.masked_fill(~mask[:, None, None, None], -torch.inf)
    share = score.softmax(-1).flatten(1, 2).mean(1)  # (B, R, N)
    return share if mask is None else share.where(mask[:, None], 0.0)
