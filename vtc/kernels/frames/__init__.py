"""Similarity of consecutive frames."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity


def frame_similarity(frames: Tensor) -> Tensor:
    """`(T - 1, N)` float32: cosine of each place in one frame of `(T, N, D)` with the same place in the next.

    There is no kernel: each feature is read once and little is computed, which is what `torch.compile` makes of these
    lines. `benchmarks/kernels.py` compares them with that, and with a kernel.
    """
    frames = frames.detach().float()
    return cosine_similarity(frames[1:], frames[:-1], dim=2)
