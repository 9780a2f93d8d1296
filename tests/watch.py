"""Watching what a computation asks of the device, on a CPU as it would be on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
        if boolean or name in WAITS:
            self.waits.append(name)
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else [out]:
            if isinstance(part, Tensor):
                self.largest = max(self.largest, part.numel())
        return out
