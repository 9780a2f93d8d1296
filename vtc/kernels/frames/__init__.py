"""Similarity of consecutive frames."""

from __future__ import annotations

from torch import Tensor

from vtc.kernels.cosine import lengths, products

SHORTEST = 1e-8  # lengths below that count as that, so that rows of zeros are like nothing


def frame_similarity(frames: Tensor) -> Tensor:
    """`(T - 1, N)` float32: cosine of each place in one frame of `(T, N, D)` with the same place in the next.

    There is no kernel. Lengths and products read the features three times in all, where
    `torch.nn.functional.cosine_similarity` makes float32 tensors of their size on the way; a kernel could do with once.
    `benchmarks/kernels.py` compares all of these, and `torch.compile`.
    """
    frames = frames.detach()
    length = lengths(frames).clamp_min(SHORTEST)  # (T, N)
    rows = frames.flatten(0, 1)[:, None]  # (T * N, 1, D)
    places = frames.shape[1]
    product = products(rows[places:], rows[: len(rows) - places])  # ((T - 1) * N, 1, 1)
    return product.view(-1, places) / (length[1:] * length[:-1])
