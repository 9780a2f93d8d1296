"""What several Triton kernels share."""

import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"enable_fp_fusion": True}  # of every launch; said aloud, as Triton is about to change its default


@triton.jit
def inverse(length):
    """One over the length; 0 for a row that has no direction, like `vtc.kernels.cosine.unit`."""
    return tl.where((length > 0.0) & (length < float("inf")), tl.div_rn(1.0, tl.maximum(length, 1e-12)), 0.0)


@triton.jit
def cosine(product, inverse, other):
    """A row without direction may hold anything, NaN too, but its cosines are 0."""
    scale = inverse * other
    return tl.where(scale > 0.0, product * scale, 0.0)


@triton.jit
def lowest(value, index):
    """Where the smallest value is; the lowest index among equals.

    Values are compared as integers that have the order of the floats: one instruction reduces those over a warp. Zero
    is added to make -0 equal to 0.
    """
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.min(tl.where(order == tl.min(order, 0), index, 0x7FFFFFFF), 0)


def aligned(x: Tensor) -> Tensor:
    """`x` with rows without gaps and strides that are multiples of 8, which the kernels turn into 16-byte loads."""
    return x if x.stride(-1) == 1 and all(s % 8 == 0 for s in x.stride()[:-1]) else x.contiguous()
