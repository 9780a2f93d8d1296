"""`compress`, `restore` and `Session`: attaching compressors to a model, and what happens during a call.

Everything hangs on the model's own hook tables, nothing is replaced. During one call of the multimodal module:

    encoder          taps compute the saliency rows; they travel on the encoder's output
    language model   pre-hook: tokens are selected and the sequence shrinks; post-hook: it gets its old length back
    rotary module    pre-hook: survivors are rotated by their true positions

The language model itself is handed positions without gaps, because it (and FlashAttention) would take gaps for the
borders of packed sequences.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtc import adapters
from vtc.adapters.base import Adapter
from vtc.boundary import Shrink, bind, continue_call, shrink_call
from vtc.cache import CacheState, cache_state, set_cache_state
from vtc.choice import Choice, choose
from vtc.compressor import NEEDS, Compressor, as_compressors, available, strategy
from vtc.errors import SpecError, UnsupportedModelError, VtcError
from vtc.report import Report
from vtc.saliency import Tap

ROWS = "vtc_saliency"  # attribute of the encoder's output that carries the saliency rows, {layer: (I, S)}


def compress(model: nn.Module, spec: str | Compressor | Iterable[str | Compressor]) -> Session:
    """Make `model` carry fewer visual tokens, in place, until `restore(model)` or the end of a `with` block.

    Args:
        model: a supported Hugging Face vision-language model, or anything that wraps one.
        spec: a compressor or a spec string such as `"fastervlm:keep=64"`; see `available()` for the names.

    Returns:
        The session: a context manager, with `last` (the report of the most recent call) and `remove()`.

    A model that is already compressed gets the new compressor instead of the old one.

    Raises:
        SpecError: the spec is not understood, or asks for more tokens than the model has.
        UnsupportedModelError: no adapter for this model, or its encoder lacks what the strategy needs.

    After an error the model is as it was.
    """
    session = Session(adapters.find(model), as_compressors(spec))
    restore(model)
    session._install()
    return session


def restore(model: nn.Module) -> None:
    """Undo `compress`: the model is bit for bit what it was. Does nothing to a model that is not compressed."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Session):
                owner.remove()


@dataclass
class _Call:
    """State of one call of the multimodal module; it dies with the call."""

    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    has_pixels: bool = False
    encoded: Any = None  # output of the encoder, whose `pooler_output` holds (N_i, D) features per visual input
    shrink: Shrink | None = None
    positions: Tensor | None = None  # true positions of the survivors, (..., B, K)
    state: CacheState | None = None  # what the cache must remember after the call


@dataclass(frozen=True)
class _Record:
    """What a report is made from, on the device where it happened; turned into plain data when somebody asks."""

    choice: Choice
    prompts: int
    sequence_in: int
    sequence_out: int


class Session:
    """Compressors attached to a model. Made by `vtc.compress`."""

    def __init__(self, adapter: Adapter, compressors: tuple[Compressor, ...]) -> None:
        if len(compressors) > 1:
            names = ", ".join(str(item) for item in compressors)
            raise SpecError(f"one compressor can act at the language model's input, got {len(compressors)}: {names}")
        self.adapter = adapter
        self.compressor = compressors[0]
        self._check()
        self._taps = self._make_taps()
        self._handles: list[RemovableHandle] = []
        self._local = threading.local()
        self._record: _Record | None = None
        self._report: Report | None = None
        self._validated = False

    # ------------------------------------------------------------------------------------------- for users

    @property
    def last(self) -> Report | None:
        """What the most recent call with visual inputs did; `None` before the first one."""
        if self._report is None and self._record is not None:
            self._report = self._make_report(self._record)
        return self._report

    @property
    def active(self) -> bool:
        """Whether the compressors are still attached."""
        return bool(self._handles)

    def remove(self) -> None:
        """Detach. The model is as it was; reports stay readable."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._local = threading.local()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self.active else "removed"
        return f"<vtc.Session {self.compressor} on {type(self.adapter.multimodal).__name__}, {state}>"

    # ------------------------------------------------------------------------------------------- attaching

    def _check(self) -> None:
        compressor, encoder = self.compressor, self.adapter.encoder_info
        if compressor.site != "input":
            raise SpecError(f"{compressor.name} acts at site '{compressor.site}'; only 'input' exists")
        unknown = compressor.needs - NEEDS
        if unknown:
            raise SpecError(f"{compressor.name} needs {sorted(unknown)}; a strategy can need {sorted(NEEDS)}")
        if "cls" in compressor.needs and not encoder.class_token:
            raise UnsupportedModelError(
                f"{compressor} reads the attention of a class token and this {type(self.adapter.encoder).__name__} has "
                f"none; {self._alternatives()}"
            )
        limit = self.adapter.tokens_per_image
        if isinstance(compressor.keep, int) and limit is not None and compressor.keep > limit:
            raise SpecError(
                f"keep={compressor.keep} is more than the {limit} visual tokens of an image; use at most {limit}"
            )

    def _alternatives(self) -> str:
        """What works on an encoder without a class token: options of this strategy, and other strategies."""
        hints = get_type_hints(type(self.compressor))
        options = [
            f"{self.compressor.name}:{item.name}={value}"
            for item in fields(self.compressor)
            if get_origin(hints[item.name]) is Literal
            for value in get_args(hints[item.name])
            if "cls" not in replace(self.compressor, **{item.name: value}).needs
        ]
        others = [name for name in available() if name != "none" and "cls" not in strategy(name)().needs]
        return f"use {', '.join(options + others)}"

    def _make_taps(self) -> dict[int, Tap]:
        kinds = self.compressor.needs & {"cls", "received"}
        if not kinds:
            return {}
        if len(kinds) == 2:
            raise SpecError(f"{self.compressor.name} needs both 'cls' and 'received'; a strategy reads one kind of row")
        layers = self.compressor.layers(self.adapter.encoder_info)
        return {layer: Tap(self.adapter.attention(layer), "cls" if "cls" in kinds else "received") for layer in layers}

    def _install(self) -> None:
        adapter, handles = self.adapter, self._handles
        handles.append(adapter.multimodal.register_forward_pre_hook(self._enter, with_kwargs=True))
        handles.append(adapter.multimodal.register_forward_hook(self._leave, always_call=True))
        for tap in self._taps.values():
            handles += tap.install()
        handles.append(adapter.encoder.register_forward_hook(self._encoded))
        handles.append(adapter.language_model.register_forward_pre_hook(self._shrink, with_kwargs=True))
        handles.append(adapter.language_model.register_forward_hook(self._grow))
        handles.append(adapter.rotary.register_forward_pre_hook(self._rotate, with_kwargs=True))

    # ------------------------------------------------------------------------------------------- hooks, in order

    @property
    def _call(self) -> _Call | None:
        """The call that this thread is in. Calls of one model do not nest, so a new one replaces an interrupted one."""
        return getattr(self._local, "call", None)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = bind(module, args, kwargs)
        ahead = arguments.get("mm_encoder_outputs") or {}  # what generate, or the caller, encoded before this call
        self._local.call = _Call(
            input_ids=arguments.get("input_ids"),
            inputs_embeds=arguments.get("inputs_embeds"),
            has_pixels=arguments.get("pixel_values") is not None,
            encoded=ahead.get("image"),
        )

    def _encoded(self, module: nn.Module, args: Any, output: Any) -> None:
        # This object later carries the projected features, through generate if need be. It carries the rows too, so
        # they can never be read together with another image's features.
        setattr(output, ROWS, {layer: tap.pop() for layer, tap in self._taps.items()})
        if self._call is not None and self._call.has_pixels:
            self._call.encoded = output

    def _shrink(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = self._call or _Call()
        arguments = bind(module, args, kwargs)
        state = cache_state(arguments.get("past_key_values"))
        choice = self._choose(call)
        if choice is not None and choice.dropped > 0:
            place = self.adapter.placeholders(call.input_ids, call.inputs_embeds)
            shrunk = shrink_call(arguments, choice, place, state, self.compressor.positions)
            call.shrink, call.positions, call.state = shrunk.shrink, shrunk.positions, shrunk.state
            self._remember(choice, place, shrunk.shrink.index)
            return (), shrunk.arguments
        if choice is not None:
            self._remember(choice, arguments["inputs_embeds"], arguments["inputs_embeds"])
        if state is None:
            return None
        arguments, call.state = continue_call(arguments, state)
        if self._call is None:  # the language model was called on its own: nobody else would update the cache
            set_cache_state(arguments["past_key_values"], call.state)
        return (), arguments

    def _rotate(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._call is None or self._call.positions is None:
            return None
        return (), {**bind(module, args, kwargs), "position_ids": self._call.positions}

    def _grow(self, module: nn.Module, args: Any, output: Any) -> Any:
        call = self._call or _Call()
        if isinstance(output, tuple):
            cache = next((item for item in output[1:] if hasattr(item, "get_seq_length")), None)
        else:
            cache = getattr(output, "past_key_values", None)
        if cache is not None and call.state is not None:
            set_cache_state(cache, call.state)
        if call.shrink is None:
            return None
        if isinstance(output, tuple):
            return (call.shrink.put_back(output[0]), *output[1:])
        output.last_hidden_state = call.shrink.put_back(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(call.shrink.put_back(layer) for layer in output.hidden_states)
        return output

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._local.call = None

    # ------------------------------------------------------------------------------------------- selecting

    def _choose(self, call: _Call) -> Choice | None:
        if call.encoded is None:
            if call.has_pixels:
                raise VtcError("pixel values were given but the vision encoder never ran, so nothing could be dropped")
            return None
        features = list(call.encoded.pooler_output)  # (N_i, D) each
        layouts = self.adapter.layouts(features)
        rows = partial(self._saliency, call.encoded, features)
        choice = choose(self.compressor, layouts, features, rows, validate=not self._validated)
        self._validated = True
        return choice

    def _saliency(self, encoded: Any, features: Sequence[Tensor], members: Sequence[int]) -> Tensor:
        """`(B, R, N)`: the rows that travelled on the encoder's output, of the visual inputs with these numbers."""
        rows = getattr(encoded, ROWS, None)
        if rows is None or set(rows) != set(self._taps):
            raise VtcError("the image features were computed before vtc.compress(model, ...): compute them again")
        stacked = torch.stack([self.adapter.token_rows(rows[layer]) for layer in self._taps], dim=1)  # (I, R, N)
        images = list(range(len(features)))
        if len(images) != len(stacked):
            # Beam search and num_return_sequences repeat the features, as the same tensors, after the encoder ran.
            order: dict[int, int] = {}
            images = [order.setdefault(id(feature), len(order)) for feature in features]
            if len(order) != len(stacked):
                raise VtcError(f"{len(features)} visual inputs arrived, but the encoder saw {len(stacked)}")
        wanted = [images[number] for number in members]
        return stacked if wanted == list(range(len(stacked))) else torch.stack([stacked[image] for image in wanted])

    # ------------------------------------------------------------------------------------------- reporting

    def _remember(self, choice: Choice, before: Tensor, after: Tensor) -> None:
        self._record = _Record(choice, before.shape[0], before.shape[1], after.shape[1])
        self._report = None

    def _make_report(self, record: _Record) -> Report:
        from vtc.eval.flops import prefill_flops

        choice = record.choice
        kept = [tuple(range(layout.tokens)) for layout in choice.layouts]
        sources: list[tuple[int, ...] | None] = [None] * len(kept)
        for members, selection in choice.groups.values():
            for number, row in zip(members, selection.index.tolist(), strict=True):
                kept[number] = tuple(row)
            if selection.merges:
                for number, row in zip(members, selection.sources().tolist(), strict=True):
                    sources[number] = tuple(row)
        config = self.adapter.text_config
        return Report(
            spec=str(self.compressor),
            kept=tuple(kept),
            sources=tuple(sources),
            grids=tuple(layout.grid for layout in choice.layouts),
            prompts=record.prompts,
            sequence_in=record.sequence_in,
            sequence_out=record.sequence_out,
            prefill_flops=record.prompts * prefill_flops(config, record.sequence_out),
            prefill_flops_full=record.prompts * prefill_flops(config, record.sequence_in),
            fit=self.adapter.fit,
        )
