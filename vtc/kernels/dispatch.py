"""The dispatcher: which implementation runs, and how `torch.compile` sees it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
CAPABILITY = (8, 0)  # the oldest that the kernels are compiled for in the tests


def fused(*tensors: Tensor | None) -> bool:
    """Whether the Triton kernels can take these tensors.

    They must be on one NVIDIA GPU that has what the kernels need, floating ones in a precision the kernels read, and
    Triton must be installed. Nothing is imported to find out, and nothing waits for the device.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and all(x.device == device and (not x.is_floating_point() or x.dtype in DTYPES) for x in given)
        and _installed()
        and _capability(device) >= CAPABILITY
    )


def operator(schema: str, fake: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator: make a function the `torch.library` operator `vtc::<schema>`, the same for every kind of device.

    `torch.compile` keeps operators whole and learns the shape of the result from `fake`. They have no gradient unless
    one is registered: callers detach what they pass in.
    """
    name, parenthesis, rest = schema.partition("(")

    def register(implementation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(implementation)
        def run(tensor: Tensor, *arguments: Any) -> Tensor:
            with torch.cuda.device_of(tensor):  # Triton launches on the current GPU, wherever its arguments are
                return implementation(tensor, *arguments)

        torch.library.define(f"vtc::{name}", parenthesis + rest)
        torch.library.impl(f"vtc::{name}", "CompositeExplicitAutograd", run)
        torch.library.register_fake(f"vtc::{name}", fake)
        overload: Any = getattr(torch.ops.vtc, name).default
        overload.__wrapped__ = run  # as `functools.wraps` leaves it
        return overload

    return register


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
