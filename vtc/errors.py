"""The errors users meet. Each message says what was wrong and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NoReturn


class VtcError(ValueError):
    """Base class: bad input that the caller can correct."""


class SpecError(VtcError):
    """A compressor spec that cannot be understood: unknown strategy, unknown key, value out of range."""


class UnsupportedModelError(VtcError):
    """A model, or a vision encoder, that cannot do what was asked of it."""


# Of a part of a model, where going on would give wrong answers. torch.compile goes on using code that it made without
# hooks; PEFT and quantisation put other modules in the place of those that have them.
WITHOUT_HOOKS = (
    "ran without the hooks of vtc: if it is compiled, set torch._dynamo.config.skip_nnmodule_hook_guards = False and "
    "call torch.compiler.reset(); if it was replaced (PEFT, quantisation), call vtc.compress(model, ...) again"
)


def refuse_copies(hooked: object) -> NoReturn:
    """`__reduce__` of what hangs on the modules of one model, and would act on that model from a copy as well."""
    raise VtcError("a compressed model cannot be copied or pickled: call vtc.restore(model) first")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""
