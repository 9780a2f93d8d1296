"""Weighted merge: one program per survivor and block of channels, which reads its own tokens and nothing else."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels.parts import OPTIONS


@triton.jit
def merge_kernel(x, order, ends, source, weight, out, E, K, C, sxb, sxn, ENTRIES: tl.constexpr, CHANNELS: tl.constexpr):
    """Grid (C / CHANNELS, K, B)."""
    b = tl.program_id(2).to(tl.int64)
    slot = tl.program_id(1)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.load(ends + b * (K + 1) + slot)
    last = tl.load(ends + b * (K + 1) + slot + 1)
    total = tl.zeros((CHANNELS,), tl.float32)
    for start in range(first, last, ENTRIES):
        e = start + tl.arange(0, ENTRIES)
        entry = tl.load(order + b * E + e, mask=e < last, other=0)
        token = tl.load(source + b * E + entry, mask=e < last, other=0)
        share = tl.load(weight + b * E + entry, mask=e < last, other=0.0).to(tl.float32)
        inside = (e < last)[:, None] & (c < C)[None, :]
        rows = tl.load(x + b * sxb + token[:, None].to(tl.int64) * sxn + c[None, :], mask=inside, other=0.0)
        total += tl.sum(rows.to(tl.float32) * share[:, None], 0)
    tl.store(out + (b * K + slot) * C + c, total, mask=c < C)


def merge(x: Tensor, order: Tensor, ends: Tensor, source: Tensor, weight: Tensor) -> Tensor:
    """See `vtc.kernels.merge.naive.merge`."""
    x = x if x.stride(2) == 1 else x.contiguous()
    batch, _, channels = x.shape
    kept = ends.shape[1] - 1
    out = torch.empty(batch, kept, channels, dtype=x.dtype, device=x.device)
    merge_kernel[(triton.cdiv(channels, 256), kept, batch)](
        x, order, ends, source.contiguous(), weight.contiguous(), out, source.shape[1], kept, channels,
        x.stride(0), x.stride(1), ENTRIES=8, CHANNELS=256, num_warps=2, **OPTIONS,
    )  # fmt: skip
    return out
