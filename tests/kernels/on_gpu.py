"""A pytest plug-in: `-p on_gpu` runs the tests of the kernels on a GPU; without one on one that is pretended.

What an operation is given is moved there, and its result back.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from vtc import kernels

sys.path.insert(0, str(Path(__file__).parents[1]))
from pretend import pretended


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in kernels.__all__:
        monkeypatch.setattr(kernels, name, there(getattr(kernels, name)))
    with nullcontext() if torch.cuda.is_available() else pretended():
        yield


def there(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(operation)
    def run(*args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = tree_map(lambda x: x.to("cuda") if isinstance(x, Tensor) else x, (args, kwargs))
        out = operation(*args, **kwargs)
        assert out.device.type == "cuda"
        return out.cpu()

    return run
