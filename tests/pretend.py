"""A GPU that is not there: tensors say that they are on `cuda`, and are computed with on the CPU.

What mixes devices fails as it would on a GPU, and what waits for the device can be counted (`watch.py`). Kernels of
Triton run in its interpreter, if `TRITON_INTERPRET=1` was set from the start of the process; else references run.

Changes how torch behaves in the whole process while it lasts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
CAPABILITY = (9, 0)
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class There(Tensor):
    """A tensor that says it is on a GPU; `here` holds its data, and views share it."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor, device: torch.device | None = None, requires_grad: bool = False) -> Any:
        if isinstance(here, There):  # accelerate makes parameters of the type that they had
            return torch.nn.Parameter(here, requires_grad)
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(),
            dtype=here.dtype, layout=here.layout, device=device,
        )  # fmt: skip
        made.here = here
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.here} as on {self.device}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a GPU that is not there: only inside `pretended()`")


class Device(TorchDispatchMode):
    """Runs operations on what the tensors hold, if these are all on one device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = {x.device for x in given if x.device != CPU or x.ndim}
        device = next(iter(devices - {CPU}), CPU)
        if func in MOVES:
            device = given[0].device
        elif func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) and given[0].device != CPU:
            device, devices = given[0].device, devices - {CPU}  # indices are uploaded
        if len(devices) > 1 and func not in MOVES:
            raise RuntimeError(f"{func}: expected all tensors on the same device, found {sorted(map(str, devices))}")
        if func.namespace == "vtc":  # goes on here with what it is made of
            with self:
                return func.__wrapped__(*args, **kwargs)
        if kwargs.get("device") is not None:
            device, kwargs["device"] = numbered(kwargs["device"]), CPU
        if func is torch.ops.aten._fused_sdp_choice.default:
            return 0  # attention as its formula, in operations that every device has
        held = {id(x.here): x for x in given if isinstance(x, There)}
        args, kwargs = tree_map(lambda x: x.here if isinstance(x, There) else x, (args, kwargs))
        if func is torch.ops.aten.bmm.dtype:  # exists for GPUs only
            out = torch.bmm(args[0].to(args[2]), args[1].to(args[2]))
        else:
            out = func(*args, **kwargs)
        # In-place operations return the tensor that they were given.
        return tree_map(lambda x: held.get(id(x), there(x, device)) if isinstance(x, Tensor) else x, out)


class Calls(TorchFunctionMode):
    """What torch would ask a driver: the number of the current GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = ([numbered(x) for x in args], {name: numbered(x) for name, x in (kwargs or {}).items()})
        if func is Tensor.cuda:
            func, args = Tensor.to, [args[0], torch.device("cuda", args[1] if len(args) > 1 else 0)]
        if func is Tensor.tolist:  # torch makes no lists of tensors that are not its own
            args = [args[0].to(CPU)]
        if func is torch.tensor:  # reads lists of numbers where it does not ask us
            args = tree_map(lambda x: x.item() if isinstance(x, There) and not x.ndim else x, args)
        return func(*args, **kwargs)


class Event:
    """Events of a device that is never behind."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self, stream: None) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.time - self.time)  # milliseconds


def numbered(x: Any) -> Any:
    """The first GPU instead of any."""
    return torch.device("cuda", 0) if isinstance(x, str | torch.device) and str(x) == "cuda" else x


def there(x: Tensor, device: torch.device) -> Tensor:
    return x if device == CPU else There(x, device)


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """There is a GPU, or several."""
    with contextlib.ExitStack() as stack:
        for name, value in {
            "_lazy_init": lambda: None,
            "_exchange_device": lambda index: index,
            "_maybe_exchange_device": lambda index: index,
            "get_device_capability": lambda device=None: CAPABILITY,
            "get_device_name": lambda device=None: "GPU that is pretended",
            "device_count": lambda: 2,
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "current_stream": lambda device=None: None,
            "synchronize": lambda device=None: None,
            "reset_peak_memory_stats": lambda device=None: None,
            "max_memory_allocated": lambda device=None: 2**20,
            "Event": Event,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(_guarded())
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes a tensor here, and then moves it
        if os.environ.get("TRITON_INTERPRET") == "1":
            stack.enter_context(_interpreted())
        else:
            stack.enter_context(mock.patch("vtc.kernels.dispatch._installed", lambda: False))
        stack.callback(
            torch.__future__.set_overwrite_module_params_on_conversion,
            torch.__future__.get_overwrite_module_params_on_conversion(),
        )
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(Device())
        stack.enter_context(Calls())
        yield


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """Tells torch how to make a GPU the current one: as for tensors on `meta`, by doing nothing.

    A torch for CPUs does not know, and has no way to tell it but the table where it looks.
    """
    library = next(Path(torch.__file__).parent.glob("lib/libc10.so"))
    table = (ctypes.c_void_p * 32).in_dll(ctypes.CDLL(str(library)), "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = (int(getattr(torch._C._autograd.DeviceType, name)) for name in ("CUDA", "Meta"))
    before, table[cuda] = table[cuda], table[meta]
    try:
        yield
    finally:
        table[cuda] = before


def _interpreted() -> Any:
    """Launches reach the interpreter with what the tensors hold."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        args, kwargs = tree_map(lambda x: x.here if isinstance(x, There) else x, (args, kwargs))
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            launch(self, *args, **kwargs)

    return mock.patch.object(GridExecutor, "__call__", run)
