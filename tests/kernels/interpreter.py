"""A pytest plug-in: `-p interpreter` runs the tests on the Triton kernels, in Triton's interpreter, on CPU tensors.

Needs `TRITON_INTERPRET=1` from the start of the process. Every test runs twice, with the programs of each launch in
order and in reverse, so that a kernel in which one program relies on another fails. Every address must be inside of a
tensor that the launch was given. Memory that kernels see comes between guard bands of NaN (of the largest value, for
integers), is filled with the same where it is meant to be written, and is checked afterwards: what is not written, or
written elsewhere, shows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

OPERATIONS = ("assign", "greedy", "merge", "peaks", "received", "rows")
BAND = 64  # elements: what follows stays aligned to 16 bytes
BUILDER = interpreter.InterpreterBuilder


def poison(dtype: torch.dtype) -> float | int:
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max


class Memory:
    """Hands out guarded tensors and remembers them."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._empty = torch.empty

    def empty(self, *shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * BAND,), poison(dtype), dtype=dtype, device=device)
        self._buffers.append(buffer)
        return buffer[BAND : BAND + size].view(shape)

    def copy(self, x: Tensor) -> Tensor:
        return self.empty(*x.shape, dtype=x.dtype, device=x.device).copy_(x)

    def check(self) -> None:
        for buffer in self._buffers:
            for band in (buffer[:BAND], buffer[-BAND:]):
                assert band.isnan().all() if band.is_floating_point() else (band == poison(band.dtype)).all()


@pytest.fixture(autouse=True, params=["forward", "reversed"])
def kernels_instead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    memory = Memory()
    for name in OPERATIONS:
        operation, kernel = (importlib.import_module(f"vtc.kernels.{name}{part}") for part in ("", ".triton"))
        monkeypatch.setattr(operation, "fused", lambda *tensors: True)
        monkeypatch.setattr(operation, "naive", None)
        for helper in ("gram", "products", "lengths"):
            if hasattr(kernel, helper):
                monkeypatch.setattr(kernel, helper, guarded(getattr(kernel, helper), memory))
        monkeypatch.setattr(kernel, "torch", Torch(memory))
    if request.param == "reversed":
        monkeypatch.setattr(interpreter.interpreter_builder, "set_grid_idx", reverse)
    yield
    memory.check()


class Torch:
    """The module `torch` as kernels see it: with guarded memory."""

    def __init__(self, memory: Memory) -> None:
        self.empty = memory.empty

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def guarded(helper: Callable[..., Any], memory: Memory) -> Callable[..., Any]:
    def call(*inputs: Tensor) -> Any:
        out = helper(*inputs)
        return memory.copy(out) if isinstance(out, Tensor) else tuple(map(memory.copy, out))

    return call


_in_order = interpreter.interpreter_builder.set_grid_idx


def reverse(*place: int) -> None:
    _in_order(*(int(size) - 1 - i for size, i in zip(interpreter.interpreter_builder.grid_dim, place, strict=True)))


_arguments = interpreter.GridExecutor._init_args_hst


def note_arguments(self: Any, *arguments: Any) -> Any:
    """Remembers the first and the last byte of every tensor of a launch."""
    out = _arguments(self, *arguments)
    bounds = []
    for x in out[0]:
        if hasattr(x, "data_ptr") and x.numel():
            last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
            bounds.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()))
    CheckedAccess.bounds = np.array(bounds, dtype=np.uint64)
    return out


class CheckedAccess:
    """The interpreter's access to memory, which fails at addresses that are in no tensor."""

    bounds: np.ndarray

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._check(pointers, mask, np.dtype(dtype).itemsize)
        return _access.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        self._check(pointers, mask, value.dtype.itemsize)
        return _access.store(pointers, value, mask)

    def __getattr__(self, name: str) -> Any:
        return getattr(_access, name)

    def _check(self, pointers: Any, mask: Any, size: int) -> None:
        pointers, mask = np.broadcast_arrays(pointers, mask)
        start = pointers[mask.astype(bool)].astype(np.uint64)[:, None]
        inside = (start >= self.bounds[:, 0]) & (start + np.uint64(size) <= self.bounds[:, 1])
        assert inside.any(axis=1).all(), "access out of bounds"


_access = interpreter._interpreter
interpreter._interpreter = CheckedAccess()
interpreter.GridExecutor._init_args_hst = note_arguments


# The interpreter keeps bfloat16 as the bits it is made of. Products and sums of those are garbage, and casts to it cut
# bits off. Kernels need two things of it: products of matrices, and rounding to the nearest.

_dot, _cast = BUILDER.create_dot, BUILDER.cast_impl


def is_bfloat16(value: Any) -> bool:
    return isinstance(value, interpreter.TensorHandle) and value.dtype.scalar == tl.bfloat16


def widen(value: Any) -> Any:
    if not is_bfloat16(value):
        return value
    return interpreter.TensorHandle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _dot(self, widen(a), widen(b), *rest)


def cast(self: Any, value: Any, target: Any) -> Any:
    if value.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(value.data)).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(rounded.view(np.uint16), tl.bfloat16)
    return _cast(self, value, target)


BUILDER.create_dot, BUILDER.cast_impl = dot, cast
