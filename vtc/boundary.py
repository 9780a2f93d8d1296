"""The language-model boundary: fewer tokens go in, the same shapes come out.

Everything here is about one call of the language model. Shapes: `B` prompts of `S` tokens in this call, `K` of them
left, on top of `P` tokens that the cache holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vtc.cache import CacheState
from vtc.choice import Choice
from vtc.errors import VtcError

PREPARED = "a prepared 4-D attention mask cannot continue a compressed cache; pass a 2-D mask"


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a module call by name, however the caller passed them."""
    if not args:
        return dict(kwargs)
    names = [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return {**dict(zip(names, args, strict=False)), **kwargs}


@dataclass(frozen=True)
class Shrink:
    """Which of `S` tokens stay in a call, per row, and how to get back.

    Rows that keep fewer tokens than others are filled up on the left with tokens that are masked out.

    Attributes:
        index: `(B, K)` int64, ascending: the tokens that stay.
        valid: `(B, K)` bool: `False` for fillers and padding.
        back: `(B, S)` int64 in `[0, K)`: for every token of the call the survivor that stands at its place or, if the
            token was dropped, the nearest survivor before it.
    """

    index: Tensor
    valid: Tensor
    back: Tensor

    @classmethod
    def plan(cls, kept: Tensor, length: int) -> Shrink:
        """Keep `kept` `(B, S)` bool; no row keeps more than `length` tokens."""
        size = kept.shape[1]
        index = (
            kept.byte().sort(dim=1, stable=True).indices[:, size - length :]
        )  # dropped first, survivors last in order
        running = kept.cumsum(1)
        back = length - running[:, -1:] + running - 1
        return cls(index, kept.gather(1, index), back.clamp_(min=0))

    def take(self, x: Tensor) -> Tensor:
        """Rows of `(B, S, D)` that stay: `(B, K, D)`."""
        return x.gather(1, self.index[..., None].expand(-1, -1, x.shape[-1]))

    def take_last(self, x: Tensor) -> Tensor:
        """Entries of `(..., B or 1, S)` that stay: `(..., B, K)`."""
        x = x.expand(*x.shape[:-2], self.index.shape[0], x.shape[-1])
        return x.gather(-1, self.index.expand(*x.shape[:-1], -1))

    def take_mask(self, mask: Tensor, past: int) -> Tensor:
        """A 4-D mask `(B or 1, H, S, L)` over `past` earlier tokens and this call's `S`, cut to what stays.

        Columns of a static cache beyond this call (`L > past + S`) stay, empty, at the end.
        """
        batch, keep = self.index.shape
        rows = mask.expand(batch, *mask.shape[1:])
        rows = rows.gather(2, self.index[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))
        earlier = torch.arange(past, device=mask.device).expand(batch, -1)
        columns = torch.cat([earlier, past + self.index], dim=1)[:, None, None]
        out = rows.gather(3, columns.expand(-1, rows.shape[1], keep, -1))
        off = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        real = torch.cat([torch.ones_like(earlier, dtype=torch.bool), self.valid], dim=1)[:, None, None]
        out = out.masked_fill(~real, off)
        beyond = mask.shape[3] - past - self.back.shape[1]
        return out if beyond <= 0 else nn.functional.pad(out, (0, mask.shape[3] - out.shape[3]), value=off)

    def put_back(self, x: Tensor) -> Tensor:
        """`(B, K, D)` to `(B, S, D)`. A dropped place repeats the survivor before it, whose next token is the same."""
        return x.gather(1, self.back[..., None].expand(-1, -1, x.shape[-1]))


@dataclass(frozen=True)
class Shrunk:
    """A shortened call: the arguments for the language model, the true positions, and what must be remembered."""

    arguments: dict[str, Any]
    shrink: Shrink
    positions: Tensor  # (..., B, K)
    state: CacheState


def shrink_call(
    arguments: Mapping[str, Any],
    choice: Choice,
    place: Tensor,
    state: CacheState | None,
    numbering: Literal["original", "contiguous"],
) -> Shrunk:
    """Shorten a call of the language model.

    Args:
        arguments: its arguments by name, `inputs_embeds` `(B, S, D)` among them.
        choice: which visual tokens stay.
        place: `(B, S)` bool, where the visual tokens stand.
        state: of the cache that comes with the call, if a compressed call filled it.
        numbering: what happens to positions.
    """
    if arguments.get("output_attentions"):
        raise VtcError("a compressed call has no attention maps of the full length: call without output_attentions")
    embeds: Tensor = arguments["inputs_embeds"]
    mask = arguments.get("attention_mask")
    past = _past(arguments, state)
    batch, size, _ = embeds.shape

    place = place.to(embeds.device)
    kept = _write(torch.ones_like(place), place, choice.kept)  # (B, S)
    visual_kept = kept & place
    real = _real(mask, size, past)
    if batch == 1:
        length = size - choice.dropped
    else:
        # Rows may hold different numbers of images. How many only the ids know: the one host read of a batched prefill.
        if real is not None:
            kept = kept & real
        length = int(kept.sum(1).max())
    shrink = Shrink.plan(kept, length)

    if choice.merged is not None:
        embeds = _write(embeds, visual_kept[..., None], choice.merged)
    positions = arguments.get("position_ids")
    if positions is None:
        positions = torch.arange(past, past + size, device=embeds.device)[None]
    positions = shrink.take_last(positions.to(embeds.device))
    shift = None if state is None else state.shift
    gone = (place & ~visual_kept).cumsum(1)  # (B, S): visual tokens dropped up to here
    if numbering == "contiguous":
        positions = positions - shrink.take_last(gone)
        positions = positions if shift is None else positions - shift
        shift = gone[:, -1:] if shift is None else shift + gone[:, -1:]

    floor = (gone < gone[:, -1:]).sum(1).max() + 1  # tokens up to the last dropped one

    dropped = 0 if state is None else state.dropped
    held = _held(mask, state, past)
    now = shrink.valid if real is None else shrink.valid & shrink.take_last(real)
    whole = batch == 1 and real is None and held is None  # nothing is padded: no mask is needed
    physical = None if whole else torch.cat([_ones(held, batch, past - dropped, embeds.device), now], dim=1)

    out = dict(arguments)
    out["inputs_embeds"] = shrink.take(embeds)
    out["position_ids"] = torch.arange(past - dropped, past - dropped + length, device=embeds.device)[None]
    out["attention_mask"] = physical if mask is None or _is_flat(mask) else _cut_masks(mask, shrink, past, dropped)
    return Shrunk(
        arguments=out,
        shrink=shrink,
        positions=positions,
        state=CacheState(past + size, dropped + size - length, past + floor, physical, shift),
    )


def continue_call(arguments: Mapping[str, Any], state: CacheState) -> tuple[dict[str, Any], CacheState]:
    """Adapt a call that drops nothing but continues a compressed cache: decoding, or another turn of text."""
    embeds = arguments.get("inputs_embeds")
    reference: Tensor = embeds if embeds is not None else arguments["input_ids"]
    batch, size = reference.shape[:2]
    mask = arguments.get("attention_mask")
    out = dict(arguments)

    prepared = mask is not None and not _is_flat(mask)
    # What generate prepares for a static cache says no more than the 2-D mask below, and counts the dropped tokens too.
    # Anybody else's prepared mask means something that nobody here can translate.
    if prepared and not getattr(arguments.get("past_key_values"), "is_compileable", False):
        raise VtcError(PREPARED)
    real = None if prepared else _real(mask, size, state.length)
    physical = None
    if state.mask is not None or real is not None:
        held = _ones(state.mask, batch, state.length - state.dropped, reference.device)
        physical = torch.cat([held, _ones(real, batch, size, reference.device)], dim=1)
    out["attention_mask"] = physical

    positions = arguments.get("position_ids")
    if positions is None:
        positions = torch.arange(state.length, state.length + size, device=reference.device)[None]
    out["position_ids"] = positions if state.shift is None else positions - state.shift
    length = state.length + size
    return out, CacheState(length, state.dropped, state.floor, physical, state.shift)


def _past(arguments: Mapping[str, Any], state: CacheState | None) -> int:
    """Number of earlier tokens, dropped ones included."""
    if state is not None:
        return state.length
    cache = arguments.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def _write(fill: Tensor, place: Tensor, values: list[Tensor]) -> Tensor:
    """Write the visual inputs' rows, in order, to the `True` places of a prompt-shaped tensor."""
    return fill.masked_scatter(place, torch.cat([value.to(fill) for value in values]))


def _is_flat(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2


def _real(mask: Any, size: int, past: int) -> Tensor | None:
    """`(B, S)` bool: which tokens of this call are not padding; `None` if no mask says so."""
    if isinstance(mask, dict):
        return next((real for real in (_real(entry, size, past) for entry in mask.values()) if real is not None), None)
    if not isinstance(mask, Tensor):
        return None
    if _is_flat(mask):
        return mask[:, -size:].bool()
    diagonal = mask[:, 0].diagonal(offset=past, dim1=-2, dim2=-1)  # a token that is not padding sees itself
    return diagonal if mask.dtype == torch.bool else diagonal > torch.finfo(mask.dtype).min / 2


def _held(mask: Any, state: CacheState | None, past: int) -> Tensor | None:
    """`(B, P)` bool: which entries of the cache are not padding; `None` if all are."""
    if state is not None:
        return state.mask
    return mask[:, :past].bool() if past > 0 and _is_flat(mask) else None


def _ones(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    return torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask.to(device)


def _cut_masks(mask: Any, shrink: Shrink, past: int, dropped: int) -> Any:
    if isinstance(mask, dict):
        return {kind: _cut_masks(entry, shrink, past, dropped) for kind, entry in mask.items()}
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise VtcError(f"a prepared attention mask of type {type(mask).__name__} cannot be shortened; pass a 2-D mask")
    if dropped:
        raise VtcError(PREPARED)
    return shrink.take_mask(mask, past)
