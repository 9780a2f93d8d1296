"""What a compressed key-value cache must remember, kept on the cache itself.

A compressed cache is shorter than the text it stands for, and its layers may differ in length. `generate` slices
prompts and numbers positions by `get_seq_length()`, which must therefore count the dropped tokens too, while masks are
built from `get_query_offset()` and the tensors' true lengths, which must not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import Tensor

from vtc.errors import VtcError


@dataclass(frozen=True)
class Part:
    """What a stretch of decoder layers holds of the text.

    Attributes:
        first: the first of the layers.
        dropped: how many tokens of the text they do not hold.
        mask: `(B, length - dropped)` bool, which entries are real tokens; `None` if all are.
        shift: `(B, 1)` int64, how far later positions move up (contiguous numbering); `None` if they do not.
    """

    first: int = 0
    dropped: int = 0
    mask: Tensor | None = None
    shift: Tensor | None = None


@dataclass(frozen=True)
class CacheState:
    """The difference between the text and what a cache holds of it.

    Attributes:
        length: number of tokens the cache stands for, dropped ones included.
        floor: 0-dimensional int64: length up to which tokens were dropped; all that follow are held.
        parts: what the layers hold, by first layer; the first part starts at layer 0.
    """

    length: int
    floor: Tensor
    parts: tuple[Part, ...]

    def part(self, layer: int) -> Part:
        """The part that decoder layer `layer` belongs to."""
        return [part for part in self.parts if part.first <= layer][-1]


def cache_state(cache: Any) -> CacheState | None:
    """The state of a compressed cache; `None` for any other cache, an empty one, or no cache."""
    return getattr(cache, "_vtc_state", None)


def set_cache_state(cache: Any, state: CacheState) -> None:
    """Make `cache` answer for its dropped tokens."""
    if not isinstance(cache, _Compressed):
        base: type = type(cache)
        cache.__class__ = _compressed_class(base)
    cache._vtc_state = state


def attend(cache: Any, attended: bool) -> None:
    """Say whether a session takes care of the call that a compressed cache is part of."""
    if isinstance(cache, _Compressed):
        cache._vtc_attended = attended


class _Compressed:
    """Mixed into the class of one cache object, once a compressed call has filled it."""

    _vtc_state: CacheState | None
    _vtc_attended: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (type(self).__bases__[1],), dict(vars(self))  # pickle would look for the class by its name

    def update(self, *args: Any, **kwargs: Any) -> Any:
        if self._vtc_state is not None and not self._vtc_attended:
            raise VtcError(
                "this cache was filled by a compressed model, which is not compressed any more: it holds fewer tokens "
                "than the model believes; compress the model again, or start with a new cache"
            )
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def get_seq_length(self, layer_idx: int = 0, *args: Any, **kwargs: Any) -> Any:
        held = super().get_seq_length(layer_idx, *args, **kwargs)  # type: ignore[misc]
        return held if self._vtc_state is None else held + self._vtc_state.part(layer_idx).dropped

    def get_query_offset(self, *args: Any, **kwargs: Any) -> Any:
        return super().get_seq_length(*args, **kwargs)  # type: ignore[misc]

    def crop(self, tokens: int) -> None:
        """Remove the last `-tokens` tokens (`tokens <= 0`); a positive number is the length of the text to keep."""
        state = self._vtc_state
        if state is None:
            return super().crop(tokens)  # type: ignore[misc]
        target = state.length + tokens if tokens <= 0 else min(tokens, state.length)
        if target < state.length and bool(target < state.floor):
            raise VtcError(
                f"a compressed cache cannot be cropped to {target} tokens: that is inside its visual tokens; "
                f"crop it to {int(state.floor)} or more"
            )
        super().crop(target - state.length)  # type: ignore[misc]
        parts = tuple(
            part if part.mask is None else replace(part, mask=part.mask[:, : target - part.dropped])
            for part in state.parts
        )
        self._vtc_state = replace(state, length=target, parts=parts)
        return None

    def reset(self) -> None:
        self._vtc_state = None
        super().reset()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))
        super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda x: x[indices])
        super().batch_select_indices(indices)  # type: ignore[misc]

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        state = self._vtc_state
        if state is not None:
            parts = tuple(
                replace(
                    part,
                    mask=None if part.mask is None else function(part.mask),
                    shift=None if part.shift is None else function(part.shift),
                )
                for part in state.parts
            )
            self._vtc_state = replace(state, parts=parts)


def _blank(base: type) -> Any:
    made: Any = _compressed_class(base)
    return made.__new__(made)


@cache
def _compressed_class(base: type) -> type:
    return type(f"Compressed{base.__name__}", (_Compressed, base), {})
