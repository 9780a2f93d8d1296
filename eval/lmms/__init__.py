"""Accuracy on tasks: the bundled questions, and whatever lmms-eval has, through its plug-in `vtc_hf`.

lmms-eval finds the plug-in by its entry point, so both of these work:

    vtc eval --model PATH --spec fastervlm:keep=64 --tasks mme --out results
    python -m lmms_eval --model vtc_hf --model_args pretrained=PATH,spec=fastervlm:keep=64 --tasks mme

The first resumes, exits non-zero on failure and says per document what the answer cost. Importing this package loads
neither torch nor lmms-eval.
"""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """What lmms-eval asks the entry point for: the model's name, and the classes for chat and simple tasks."""
    from lmms_eval.models.registry_v2 import ModelManifest

    here = f"{__name__}.plugin"
    return [
        ModelManifest(model_id="vtc_hf", chat_class_path=f"{here}.VtcHf", simple_class_path=f"{here}.VtcHfSimple"),
    ]
