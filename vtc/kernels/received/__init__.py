"""Received attention: how much attention each token gets from all tokens, without an `N x N` map."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.kernels.dispatch import fused, operator
from vtc.kernels.received import naive


def received(query: Tensor, key: Tensor, scale: float, causal: bool = False) -> Tensor:
    """`(B, N)` float32: attention probability each key receives, averaged over query heads and over all `N` queries.

    Args:
        query: `(B, N, H, D)`.
        key: `(B, N, G, D)`, where `G` divides `H`: each key head serves `H / G` query heads, in order.
        scale: factor applied to the dot products before the softmax.
        causal: whether queries see only keys that do not come after them.
    """
    batch, n = key.shape[:2]
    flat = _received(query.detach().flatten(0, 1), key.detach().flatten(0, 1), None, n, scale, causal)
    return flat.view(batch, n)


def received_packed(
    query: Tensor, key: Tensor, offsets: Tensor, longest: int, scale: float, causal: bool = False
) -> Tensor:
    """`(T,)` float32: `received` for sequences of different lengths, one after the other.

    Args:
        query: `(T, H, D)`.
        key: `(T, G, D)`.
        offsets: `(B + 1,)` int32 or int64: sequence `b` is `offsets[b]` to `offsets[b + 1]`; the last one is `T`.
        longest: length of the longest sequence, which only the caller knows without waiting for the device.
        scale, causal: as for `received`.
    """
    return _received(query.detach(), key.detach(), offsets, longest, scale, causal)


@operator(
    "received(Tensor query, Tensor key, Tensor? offsets, int longest, float scale, bool causal) -> Tensor",
    fake=lambda query, key, offsets, longest, scale, causal: key.new_empty(key.shape[0], dtype=torch.float32),
)
def _received(query: Tensor, key: Tensor, offsets: Tensor | None, longest: int, scale: float, causal: bool) -> Tensor:
    width = query.shape[2]
    if fused(query, key, offsets) and query.dtype == key.dtype and width % 8 == 0 and 16 <= width <= 128:
        from vtc.kernels.received import triton

        return triton.received(query, key, offsets, longest, scale, causal)
    return naive.received(query, key, offsets, longest, scale, causal)
