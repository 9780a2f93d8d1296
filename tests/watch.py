"""Watching what a computation asks of the device, on a CPU as it would be on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = frozenset(
    {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}
    | {"_unique2", "unique_dim", "unique_consecutive"}
    | {"lift_fresh"}  # `torch.tensor`, which uploads
)


class Watch(TorchDispatchMode):
    """Notes operations that make host and device wait for each other, and the elements of the largest tensor.

    It does not see inside the operators of `vtc.kernels`; their own tests look there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        boolean = name in ("index", "index_put", "index_put_") and any(
            entry is not None and entry.dtype in (torch.bool, torch.uint8) for entry in args[1]
        )
        # Without the number of repeats, which is read.
        unknown = func is torch.ops.aten.repeat_interleave.Tensor and not (kwargs or {}).get("output_size")
        out = func(*args, **(kwargs or {}))
        copies = name in ("_to_copy", "copy_")  # numbers may stay where they are in anything else
        devices = {
            x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor) and (x.ndim or copies)
        }
        if boolean or unknown or name in WAITS or len(devices) > 1:
            self.waits.append(name)
        for part in out if isinstance(out, tuple | list) else [out]:
            if isinstance(part, Tensor):
                self.largest = max(self.largest, part.numel())
        return out
