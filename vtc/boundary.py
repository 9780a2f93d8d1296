"""The language-model boundary: fewer tokens go in, the same shapes come out.

Everything here is about one call of the language model. Shapes: `B` prompts of `S` tokens in this call, `K` of them
left, on top of `P` tokens that the cache holds.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from vtc.cache import CacheState, Part
from vtc.choice import Group
from vtc.errors import VtcError

PREPARED = "a prepared 4-D attention mask cannot continue a compressed cache; pass a 2-D mask"


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a module call by name, however the caller passed them."""
    if not args:
        return dict(kwargs)
    method = getattr(module.forward, "__func__", None)
    names = _positional(module.forward) if method is None else _parameters_of(method)[1:]  # without self
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _positional(function: Callable[..., Any]) -> list[str]:
    """Names of the parameters that can be given by position."""
    parameters = inspect.signature(function).parameters.values()
    return [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]


# A decoder layer is called once per token: looking at its signature each time would cost more than the hook itself.
_parameters_of = functools.cache(_positional)


@dataclass(frozen=True)
class Shrink:
    """Which of `S` tokens stay in a call, per row, and how to get back.

    Rows that keep fewer tokens than others are filled up on the left with tokens that are masked out.

    Attributes:
        index: `(B, K)` int64, ascending: the tokens that stay.
        valid: `(B, K)` bool: `False` for fillers and padding.
        back: `(B, S)` int64 in `[0, K)`: for every token of the call the survivor that stands at its place or, if the
            token was dropped, the nearest survivor before it; the first survivor, if there is none before it.
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
        back = length - running[:, -1:] + (running - 1).clamp(min=0)
        return cls(index, kept.gather(1, index), back.clamp_(max=length - 1))

    def follow(self, places: Tensor) -> Tensor:
        """Where the survivors among the flat places (row times `S` plus column) stand afterwards."""
        size, length = self.back.shape[1], self.index.shape[1]
        return torch.div(places, size, rounding_mode="floor") * length + self.back.flatten()[places]

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


@dataclass(frozen=True)
class Stretch:
    """Decoder layers that see the same tokens in this call.

    Attributes:
        first: the first of the layers.
        past: number of tokens their cache held before the call, `P`.
        held: `(B, P)` bool, which of these are real; `None` if all are.
        now: `(B, K)` bool, which tokens of the call are real; `None` if all are.
        numbers: `(..., B or 1, K)` int64, positions of the tokens of the call as the model numbers them.
        earlier: `(B, 1)` int64, how far tokens dropped by earlier calls move positions up; `None` if they do not.
        up: `(B, K)` int64, how far tokens dropped in this call move each position up; `None` if they do not.
        total: `(B, 1)` int64, the same for what follows this call.
        back, index: as in `Shrink`, for all tokens of the call; `None` if none was dropped so far.
        dropped: how many tokens of the text these layers do not hold, this call included.
    """

    first: int
    past: int
    held: Tensor | None
    now: Tensor | None
    numbers: Tensor
    earlier: Tensor | None
    dropped: int
    up: Tensor | None = None
    total: Tensor | None = None
    back: Tensor | None = None
    index: Tensor | None = None

    @property
    def length(self) -> int:
        """`K`."""
        return self.numbers.shape[-1]

    @property
    def positions(self) -> Tensor:
        """`(..., B or 1, K)`: what the tokens are rotated by."""
        positions = self.numbers
        for shift in (self.earlier, self.up):
            positions = positions if shift is None else positions - shift
        return positions

    @property
    def renumbered(self) -> bool:
        """Whether positions are not those that the model gives."""
        return self.earlier is not None or self.up is not None

    def mask(self, batch: int) -> Tensor | None:
        """`(B, P + K)` bool: which entries of these layers' cache are real after the call; `None` if all are."""
        if self.now is None and self.held is None:
            return None
        device = self.numbers.device
        return torch.cat(
            [_ones(self.held, batch, self.past, device), _ones(self.now, batch, self.length, device)], dim=1
        )

    def part(self, batch: int) -> Part:
        """What these layers' cache must remember after the call."""
        shift = self.total if self.earlier is None else self.earlier
        if self.earlier is not None and self.total is not None:
            shift = self.earlier + self.total
        return Part(self.first, self.dropped, self.mask(batch), shift)

    def cut(self, shrink: Shrink, kept: Tensor, numbering: Literal["original", "contiguous"]) -> Stretch:
        """What is left of these tokens after `shrink`.

        Args:
            shrink: which tokens stay.
            kept: `(B, K)` bool, `False` for dropped tokens, not for padding.
            numbering: what happens to positions.
        """
        up, total = self.up, self.total
        if up is not None:
            up = shrink.take_last(up)
        if numbering == "contiguous":
            gone = (~kept).cumsum(1)  # (B, K)
            up = shrink.take_last(gone) if up is None else up + shrink.take_last(gone)
            total = gone[:, -1:] if total is None else total + gone[:, -1:]
        padded = kept.shape[0] > 1
        now = shrink.valid if padded else None
        if self.now is not None:
            now = shrink.take_last(self.now) if now is None else now & shrink.take_last(self.now)
        return replace(
            self,
            now=now,
            numbers=shrink.take_last(self.numbers),
            up=up,
            total=total,
            back=shrink.back if self.back is None else shrink.back.gather(1, self.back),
            index=shrink.index if self.index is None else self.index.gather(1, shrink.index),
            dropped=self.dropped + shrink.back.shape[1] - shrink.index.shape[1],
        )

    def to(self, device: torch.device) -> Stretch:
        """The same on the device of other layers."""
        tensors: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)

    def enter(self, first: int, state: CacheState | None) -> Stretch:
        """The same tokens in front of layer `first`, where the cache may hold less of earlier calls."""
        if state is None:
            return replace(self, first=first)
        before, part = state.part(self.first), state.part(first)
        return replace(
            self,
            first=first,
            past=state.length - part.dropped,
            held=part.mask,
            earlier=None if part.shift is None else part.shift.to(self.numbers.device),
            dropped=self.dropped - before.dropped + part.dropped,
        )

    def floor(self, length: int) -> Tensor:
        """0-dimensional int64: up to which length of the text, `length` before the call, these layers lack tokens."""
        if self.index is None or self.back is None:
            return torch.full((), length, device=self.numbers.device)
        size = self.back.shape[1]
        filled = torch.ones_like(self.index) if self.now is None else self.now.long()
        kept = torch.zeros_like(self.back).scatter_(1, self.index, filled)
        place = torch.arange(1, size + 1, device=kept.device)
        return length + ((1 - kept) * place).amax()


def open_stretch(arguments: Mapping[str, Any], state: CacheState | None) -> Stretch:
    """All tokens of a call of the language model, in front of its first layer.

    `arguments` are those of the call by name, `state` is that of the cache among them.
    """
    reference = _reference(arguments)
    batch, size, device = *reference.shape[:2], reference.device
    mask = arguments.get("attention_mask")
    length = _text_length(arguments, state)
    # What generate prepares for a static cache says no more than a 2-D mask, and counts the dropped tokens too.
    # Anybody else's prepared mask means something that nobody here can translate.
    if state is not None and not is_flat(mask) and mask is not None:
        if not getattr(arguments.get("past_key_values"), "is_compileable", False):
            raise VtcError(PREPARED)
        mask = None
    numbers = arguments.get("position_ids")
    if numbers is None:
        numbers = torch.arange(length, length + size, device=device)[None]
    numbers = numbers.to(device)
    if numbers.ndim == 3 and numbers.shape[0] == 4:  # M-RoPE with a row for the text, which does not rotate
        numbers = numbers[1:]
    part = Part() if state is None else state.part(0)
    held = part.mask
    if state is None and length > 0 and is_flat(mask):
        held = mask[:, :length].bool().expand(batch, -1)  # type: ignore[index]
    now = _real(mask, size, length)
    now = None if now is None else now.expand(batch, -1)  # one row may stand for all
    shift = None if part.shift is None else part.shift.to(device)
    return Stretch(0, length - part.dropped, held, now, numbers, shift, part.dropped)


def _text_length(arguments: Mapping[str, Any], state: CacheState | None) -> int:
    """Number of tokens before this call, dropped ones included."""
    if state is not None:
        return state.length
    cache = arguments.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def put_back(x: Tensor, back: Tensor) -> Tensor:
    """`(B, K, D)` to `(B, S, D)`. A dropped place repeats the survivor before it, whose next token is the same."""
    return x.gather(1, back.to(x.device)[..., None].expand(-1, -1, x.shape[-1]))


def entry_arguments(
    arguments: Mapping[str, Any], stretch: Stretch, shrink: Shrink | None, state: CacheState | None
) -> dict[str, Any]:
    """The arguments with which the language model sees the tokens of `stretch` alone, positions excepted.

    It is handed numbers without gaps, because it (and FlashAttention) would take gaps for the borders of packed
    sequences; the rotary module gets the true positions. `inputs_embeds` have been shortened already.
    """
    reference = _reference(arguments)
    mask, cache = arguments.get("attention_mask"), arguments.get("past_key_values")
    out = dict(arguments)
    out["position_ids"] = gapless(stretch)
    # What generate prepares for a static cache with windows has columns for the longer prompt, and a mask may be `None`
    # where nothing was hidden, as now fillers are: then the model makes others.
    anew = getattr(cache, "is_compileable", False) and any(getattr(cache, "is_sliding", ()))
    anew = anew or (isinstance(mask, dict) and any(entry is None for entry in mask.values()))
    if mask is not None and not is_flat(mask) and shrink is not None and state is None and not anew:
        out["attention_mask"] = _cut_masks(mask, shrink, stretch.past)
    else:
        out["attention_mask"] = stretch.mask(reference.shape[0])
    return out


def gapless(stretch: Stretch) -> Tensor:
    """`(1, K)`: the places of the call's tokens in these layers' cache."""
    return torch.arange(stretch.past, stretch.past + stretch.length, device=stretch.numbers.device)[None]


@dataclass
class Places:
    """Where the visual tokens of a call stand.

    Attributes:
        spots: `(n_i,)` int64 per visual input: its tokens' flat places (row times `K` plus column) in the sequence.
        rows: the prompt each visual input belongs to; all 0 for a single prompt.
        lengths: number of real tokens per prompt; of a single prompt, its padding included.
    """

    spots: list[Tensor]
    rows: list[int]
    lengths: list[int]

    def to(self, device: torch.device) -> Places:
        """The same on the device of other layers."""
        return replace(self, spots=[places.to(device) for places in self.spots])

    def flags(self, shape: Sequence[int]) -> Tensor:
        """`(B, K)` bool: which tokens are visual."""
        spots = torch.cat(self.spots)
        none = torch.zeros(shape[0] * shape[1], dtype=torch.bool, device=spots.device)
        return none.index_fill_(0, spots, True).view(*shape)

    def drop(self, x: Tensor, now: Tensor | None, groups: Sequence[Group]) -> tuple[Tensor, Tensor, Shrink]:
        """Take the dropped tokens out of `x` `(B, K, D)`, whose real tokens are `now`. The places follow.

        Returns what is left, `(B, K2, D)`; `(B, K)` bool, which tokens were not dropped; and how it was done.
        """
        batch, size = x.shape[:2]
        flat, kept = x.flatten(0, 1), torch.ones(batch * size, dtype=torch.bool, device=x.device)
        spots, lengths = list(self.spots), list(self.lengths)
        for group in groups:
            selection = group.selection
            place = torch.stack([spots[number] for number in group.members])  # (I, n)
            flags = torch.zeros_like(place, dtype=torch.bool).scatter_(1, selection.index, True)
            kept = kept.scatter(0, place.flatten(), flags.flatten())
            left = place.gather(1, selection.index)  # (I, k)
            if selection.merges:
                rows = selection.apply(flat[place]).flatten(0, 1)
                flat = flat.index_copy(0, left.flatten(), rows.to(flat.dtype))
            for number, survivors in zip(group.members, left, strict=True):
                spots[number] = survivors
                lengths[self.rows[number]] -= group.dropped
        if max(lengths) == 0:
            raise VtcError(
                "no token of this call would be left: it has visual tokens alone, and all of them are to be dropped; "
                "give text together with them, or keep at least 1"
            )
        kept = kept.view(batch, size)
        stays = kept if now is None or batch == 1 else kept & now
        shrink = Shrink.plan(stays, max(lengths))
        self.spots, self.lengths = [shrink.follow(places) for places in spots], lengths
        return shrink.take(flat.view_as(x)), kept, shrink


def _reference(arguments: Mapping[str, Any]) -> Tensor:
    embeds = arguments.get("inputs_embeds")
    return embeds if embeds is not None else arguments["input_ids"]


def is_flat(mask: Any) -> bool:
    """Whether this is a mask of tokens, `(B, P + S)`, rather than one prepared for attention."""
    return isinstance(mask, Tensor) and mask.ndim == 2


def _real(mask: Any, size: int, past: int) -> Tensor | None:
    """`(B, S)` bool: which tokens of this call are not padding; `None` if no mask says so."""
    if isinstance(mask, dict):
        return next((real for real in (_real(entry, size, past) for entry in mask.values()) if real is not None), None)
    if not isinstance(mask, Tensor):
        return None
    if is_flat(mask):
        return mask[:, -size:].bool()
    diagonal = mask[:, 0].diagonal(offset=past, dim1=-2, dim2=-1)  # a token that is not padding sees itself
    return diagonal if mask.dtype == torch.bool else diagonal > torch.finfo(mask.dtype).min / 2


def _ones(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    return torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask.to(device)


def _cut_masks(mask: Any, shrink: Shrink, past: int) -> Any:
    if isinstance(mask, dict):
        return {kind: _cut_masks(entry, shrink, past) for kind, entry in mask.items()}
    if not isinstance(mask, Tensor):
        raise VtcError(f"a prepared attention mask of type {type(mask).__name__} cannot be shortened; pass a 2-D mask")
    return shrink.take_mask(mask, past)


def cut_deepstack(
    arguments: Mapping[str, Any], before: Sequence[Tensor], after: Places, groups: Sequence[Group], shrink: Shrink
) -> dict[str, Any]:
    """Cut what some models add to the visual tokens after the first decoder layers, as their features were cut.

    Args:
        arguments: of the language model, by name; `visual_pos_masks` `(B, S)` and `deepstack_visual_embeds`, `(V, D)`
            per layer, among them.
        before, after: where the visual tokens stood and stand.
        groups, shrink: what was dropped.
    """
    mask, features = arguments.get("visual_pos_masks"), arguments.get("deepstack_visual_embeds")
    if mask is None or features is None:
        return dict(arguments)
    number = mask.flatten().cumsum(0) - 1  # (B * S,): which row of the features a place has
    rows = [number[places] for places in before]
    order = torch.cat(after.spots).argsort()
    out = []
    for feature in features:  # (V, D)
        parts = [feature[index] for index in rows]
        for group in groups:
            cut = group.selection.apply(torch.stack([parts[member] for member in group.members]))
            for member, part in zip(group.members, cut, strict=True):
                parts[member] = part.to(feature.dtype)
        out.append(torch.cat(parts)[order])
    return {**arguments, "visual_pos_masks": after.flags(shrink.index.shape), "deepstack_visual_embeds": out}


def check_croppable(cache: Any) -> None:
    """Raise if tokens cannot be taken out of the middle of this cache."""
    if cache is not None and (cache.offloading or any(type(layer) is not DynamicLayer for layer in cache.layers)):
        raise VtcError(
            f"truncate=true takes tokens out of the cache, which a {type(cache).__name__} of fixed, quantised or "
            "offloaded tensors does not allow; use a DynamicCache, or leave truncate out"
        )


def truncate(cache: Any, stretches: Sequence[Stretch], layer: int) -> list[Stretch]:
    """Take out of the cache of earlier layers what was dropped in front of decoder layer `layer`.

    Returns the stretches as the cache has them afterwards.
    """
    last = [stretch for stretch in stretches if stretch.first <= layer][-1]
    out = []
    for number, stretch in enumerate(stretches):
        if stretch.first >= last.first or last.index is None:
            out.append(stretch)
            continue
        stay = last.index if stretch.back is None else stretch.back.gather(1, last.index)  # (B, K)
        for held in cache.layers[stretch.first : stretches[number + 1].first]:
            for name in ("keys", "values"):
                x = getattr(held, name)  # (B, G, P + K, head_dim)
                index = stay.to(x.device)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
                now = x[:, :, stretch.past :].gather(2, index)
                setattr(held, name, torch.cat([x[:, :, : stretch.past], now], dim=2))
        lost = stretch.length - last.length
        out.append(replace(stretch, now=last.now, numbers=last.numbers, dropped=stretch.dropped + lost))
    return out
