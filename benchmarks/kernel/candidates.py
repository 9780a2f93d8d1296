"""Two kernels that the library does not have. The benchmark says whether it should.

Operations like these are bound by memory, and torch has them: a kernel saves launches, and some passes over the data.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels.parts import OPTIONS


@triton.jit
def compact_kernel(
    x, numbers, mask, index, x_out, numbers_out, mask_out, S, K, C, B, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (K, B): of one survivor the features `(B, S, C)`, `ROWS` positions `(ROWS, B, S)` and the mask `(B, S)`."""
    k, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = tl.load(index + b * K + k)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        features = tl.load(x + (b * S + token) * C + c, mask=c < C)
        tl.store(x_out + (b * K + k) * C + c, features, mask=c < C)
    for row in tl.static_range(ROWS):
        tl.store(numbers_out + (row * B + b) * K + k, tl.load(numbers + (row * B + b) * S + token))
    tl.store(mask_out + b * K + k, tl.load(mask + b * S + token))


def compact(x: Tensor, numbers: Tensor, mask: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The survivors' features `(B, K, C)`, positions `(R, B, K)` and mask `(B, K)`; all inputs without gaps."""
    (batch, tokens, channels), kept = x.shape, index.shape[1]
    out = (
        x.new_empty(batch, kept, channels),
        numbers.new_empty(numbers.shape[0], batch, kept),
        mask.new_empty(batch, kept),
    )
    compact_kernel[(kept, batch)](
        x, numbers, mask, index, *out, tokens, kept, channels, batch,
        ROWS=numbers.shape[0], BLOCK=min(4096, triton.next_power_of_2(channels)), num_warps=4, **OPTIONS,
    )  # fmt: skip
    return out


@triton.jit
def frames_kernel(frames, out, T, N, D, FRAMES: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (N, (T - 1) / FRAMES): one place, over the frames of a part of the clip, each of which is read once."""
    first = tl.program_id(1) * FRAMES
    d = tl.arange(0, BLOCK)
    place = first.to(tl.int64) * N + tl.program_id(0)
    before = tl.load(frames + place * D + d, mask=d < D, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(before * before, 0))
    for _ in range(first, tl.minimum(first + FRAMES, T - 1)):
        after = tl.load(frames + (place + N) * D + d, mask=d < D, other=0.0).to(tl.float32)
        now = tl.sqrt(tl.sum(after * after, 0))
        tl.store(out + place, tl.sum(before * after, 0) / (tl.maximum(length, 1e-8) * tl.maximum(now, 1e-8)))
        before, length, place = after, now, place + N


def frame_similarity(frames: Tensor) -> Tensor:
    """See `vtc.kernels.frames.frame_similarity`."""
    count, places, width = frames.shape
    out = torch.empty(count - 1, places, dtype=torch.float32, device=frames.device)
    frames_kernel[(places, triton.cdiv(count - 1, 8))](
        frames.contiguous(), out, count, places, width,
        FRAMES=8, BLOCK=triton.next_power_of_2(width), num_warps=4, **OPTIONS,
    )  # fmt: skip
    return out
