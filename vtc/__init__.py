"""`vtc`: fewer visual tokens for an existing Hugging Face vision-language model, in one line.

    import vtc
    vtc.compress(model, "fastervlm:keep=64")
    model.generate(**inputs)
    vtc.restore(model)

Importing this package loads nothing but itself: names below are looked up when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vtc import zoo
    from vtc.compressor import Compressor, Scorer, available, register
    from vtc.errors import SpecError, UnsupportedModelError, VtcError
    from vtc.report import Report
    from vtc.selection import Selection
    from vtc.session import Session, compress, restore
    from vtc.visual import Encoder, Layout, Visual

_HOME = {
    "Compressor": "vtc.compressor",
    "Encoder": "vtc.visual",
    "Layout": "vtc.visual",
    "Report": "vtc.report",
    "Scorer": "vtc.compressor",
    "Selection": "vtc.selection",
    "Session": "vtc.session",
    "SpecError": "vtc.errors",
    "UnsupportedModelError": "vtc.errors",
    "Visual": "vtc.visual",
    "VtcError": "vtc.errors",
    "available": "vtc.compressor",
    "compress": "vtc.session",
    "register": "vtc.compressor",
    "restore": "vtc.session",
}

__all__ = [
    "Compressor",
    "Encoder",
    "Layout",
    "Report",
    "Scorer",
    "Selection",
    "Session",
    "SpecError",
    "UnsupportedModelError",
    "Visual",
    "VtcError",
    "__version__",
    "available",
    "compress",
    "register",
    "restore",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name == "zoo":
        return importlib.import_module("vtc.zoo")
    if name not in _HOME:
        raise AttributeError(f"module 'vtc' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
