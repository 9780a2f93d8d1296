"""Lengths, directions and dot products of features, in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

HALF = frozenset({torch.float16, torch.bfloat16})


def unit(features: Tensor) -> Tensor:
    """`(B, N, D)` in float32 with rows of length one, so that dot products are cosines.

    A row that has no direction (zeros, or a value that is not finite) becomes zero: its cosine with every row is 0.
    """
    return normalize(features.detach().float(), dim=-1).nan_to_num_(0.0)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Keeps a caller's autocast away from matrix products, whose rounding would decide between near ties."""
    # The one device without autocast, by its name: torch 2.11 cannot compile the question whether there is one.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def products(a: Tensor, b: Tensor) -> Tensor:
    """`(B, N, M)` float32: dot products of the rows of `(B, N, D)` and `(B, M, D)`.

    Half precision goes to the tensor cores as it is: the product of two such numbers is exact in float32, in which
    sums are kept, so nothing is rounded but the sums.
    """
    with full_precision(a.device):
        if a.is_cuda and a.dtype == b.dtype and a.dtype in HALF:
            return torch.bmm(a, b.mT, out_dtype=torch.float32)
        return a.float() @ b.float().mT


def lengths(x: Tensor) -> Tensor:
    """`(B, N)` float32: the Euclidean length of each row of `(B, N, D)`."""
    return torch.linalg.vector_norm(x if x.dtype in HALF else x.float(), dim=-1, dtype=torch.float32)


def gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dot products of all pairs of rows of `(B, N, D)`, `(B, P, P)` float32, and the rows' lengths `(B, P)`.

    `P` is `N` rounded up to a multiple of 16, with rows of zeros: only then can kernels load 16 bytes at a time.
    """
    x = pad(x, (0, 0, 0, -x.shape[1] % 16)) if x.shape[1] % 16 else x
    return products(x, x), lengths(x)
