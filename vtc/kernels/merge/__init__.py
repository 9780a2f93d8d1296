"""Weighted merge: survivors as weighted sums of tokens, in an order that is the same in every run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.kernels.dispatch import fused, operator
from vtc.kernels.merge import naive


def merge(x: Tensor, slot: Tensor, source: Tensor, weight: Tensor, kept: int) -> Tensor:
    """`(B, kept, C)`: row `s` is the sum of `weight[e] * x[source[e]]` over all entries `e` with `slot[e] == s`.

    `x` is `(B, N, C)`; `slot`, `source` and `weight` are `(B, E)`. Sums are float32, in the order of the entries; the
    result has the type of `x`. Slots without entries are zero. Differentiable in `x` and `weight`.
    """
    merged: Tensor = _merge(x, slot, source, weight, kept)
    return merged


@operator(
    "merge(Tensor x, Tensor slot, Tensor source, Tensor weight, int kept) -> Tensor",
    fake=lambda x, slot, source, weight, kept: x.new_empty(x.shape[0], kept, x.shape[2]),
)
def _merge(x: Tensor, slot: Tensor, source: Tensor, weight: Tensor, kept: int) -> Tensor:
    order = slot.sort(dim=1, stable=True)
    slots = torch.arange(kept + 1, device=slot.device).expand(slot.shape[0], -1).contiguous()
    ends = torch.searchsorted(order.values, slots)  # (B, kept + 1): slot s has the entries ends[s] to ends[s + 1]
    if fused(x, slot, source, weight):
        from vtc.kernels.merge import triton

        return triton.merge(x, order.indices, ends, source, weight)
    return naive.merge(x, order.indices, ends, source, weight)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
    x, slot, source, weight = ctx.saved_tensors
    to_x = to_weight = None
    if ctx.needs_input_grad[0]:  # the transposed map: entries go back to where they came from
        to_x = merge(gradient, source, slot, weight, x.shape[1])
    if ctx.needs_input_grad[3]:
        rows = (index[..., None].expand(-1, -1, x.shape[2]) for index in (slot, source))
        to_weight = (gradient.float().gather(1, next(rows)) * x.float().gather(1, next(rows))).sum(2).to(weight.dtype)
    return to_x, None, None, to_weight, None


torch.library.register_autograd("vtc::merge", _backward, setup_context=_save)
