"""Similarity of consecutive frames."""

from __future__ import annotations

from torch import Tensor

from vtc.kernels.cosine import products

SMALLEST = 1e-16  # products of lengths below that count as that, so that rows of zeros are like nothing


def frame_similarity(frames: Tensor) -> Tensor:
    """`(T - 1, N)` float32: cosine of each place in one frame of `(T, N, D)` with the same place in the next.

    The cosine of copies is exactly 1 (of all widths that are multiples of 16), so that places that stand still tie, and
    strategies tell them apart by index.

    There is no kernel. Products read the features four times in all; `torch.nn.functional.cosine_similarity` makes
    float32 tensors of their size on the way, and a kernel could do with reading once: `benchmarks/kernels.py` compares.
    """
    rows, places = frames.detach().flatten(0, 1)[:, None], frames.shape[1]  # (T * N, 1, D)
    rows = rows if rows.is_cuda else rows.float()  # once, and not in each product
    square = products(rows, rows).flatten().double()  # of lengths; summed up as the products below are
    product = products(rows[places:], rows[: len(rows) - places]).flatten()
    length = (square[places:] * square[: len(rows) - places]).sqrt()  # of equal numbers, these numbers again
    return (product / length.clamp_min(SMALLEST)).float().view(-1, places)
