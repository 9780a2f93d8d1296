"""A torchvision that does not load, made loadable.

Package indexes that hold one build of torchvision hold the one for CUDA. Beside a CPU build of torch its compiled part
does not load, and importing it fails: with it fail transformers' processors and lmms-eval, though neither needs that
part. Two operators have to be declared, then everything written in Python works; those operators, and its decoding of
pictures, do not.

The right torchvision needs none of this: install it from the index that torch came from.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

_declared: list[Any] = []  # declarations last as long as this object


def mend() -> bool:
    """Make `import torchvision` work, if it is installed for another build of torch; whether that was necessary.

    Call it before anything imports torchvision. Does nothing if torchvision is absent or whole.
    """
    if "torchvision" in sys.modules or find_spec("torchvision") is None:
        return False
    import torch

    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    else:
        return False
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    import torchvision  # noqa: F401

    return True
