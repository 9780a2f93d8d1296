"""Query-row scores: the attention that a few queries ([CLS], the last token, some text) pay to every key."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.kernels.dispatch import fused, operator
from vtc.kernels.rows import naive


def query_rows(query: Tensor, key: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """`(B, R, N)` float32: attention probabilities of `R` queries over all `N` keys, averaged over the query heads.

    Args:
        query: `(B, R, H, D)`.
        key: `(B, N, G, D)`, where `G` divides `H`: each key head serves `H / G` query heads, in order.
        scale: factor applied to the dot products before the softmax.
        mask: `(B, N)` bool, `False` for keys that do not take part; they score 0, as does everything if none does.
    """
    return _query_rows(query.detach(), key.detach(), scale, mask)


@operator(
    "query_rows(Tensor query, Tensor key, float scale, Tensor? mask) -> Tensor",
    fake=lambda query, key, scale, mask: query.new_empty(*query.shape[:2], key.shape[1], dtype=torch.float32),
)
def _query_rows(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    width = query.shape[3]
    if fused(query, key, mask) and query.dtype == key.dtype and width % 8 == 0 and width <= 256:
        from vtc.kernels.rows import triton

        return triton.query_rows(query, key, scale, mask)
    return naive.query_rows(query, key, scale, mask)
