"""`compress`, `restore` and `Session`: attaching compressors to a model, and what happens during a call.

Everything hangs on the one model object. During one call of the multimodal module:

    encoder          taps compute the saliency rows; they travel on the encoder's output
    language model   pre-hook: tokens are selected and the sequence shrinks; post-hook: it gets its old length back
    rotary module    pre-hook: survivors are rotated by their true positions
    decoder layers   pre-hooks, if a compressor acts there: the sequence shrinks again, with masks and rotations
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from types import TracebackType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import nn

from vtc import adapters
from vtc.adapters.base import Adapter
from vtc.call import Record
from vtc.compressor import NEEDS, Compressor, DecoderCompressor, as_compressors, available, strategy
from vtc.decoder import check_layer
from vtc.errors import SpecError, UnsupportedModelError, VtcError
from vtc.interception import Cut, Interception
from vtc.report import Report, make_report
from vtc.saliency import Tap


def compress(model: nn.Module, spec: str | Compressor | Iterable[str | Compressor]) -> Session:
    """Make `model` carry fewer visual tokens, in place, until `restore(model)` or the end of a `with` block.

    Args:
        model: a supported Hugging Face vision-language model, or anything that wraps one.
        spec: a compressor or a spec string such as `"fastervlm:keep=64"`; see `available()` for the names. Several act
            one after the other: at most one in front of the language model, any number in front of its layers.

    Returns:
        The session: a context manager, with `last` (the report of the most recent call) and `remove()`.

    A model that is already compressed gets the new compressor instead of the old one, which nothing puts back.

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
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Interception):
                owner.remove()


class Session:
    """Compressors attached to a model. Made by `vtc.compress`."""

    def __init__(self, adapter: Adapter, compressors: tuple[Compressor, ...]) -> None:
        self.adapter = adapter
        self.compressors = compressors
        if not hasattr(adapter.language_model, "rotary_emb"):
            raise UnsupportedModelError(
                f"a {type(adapter.language_model).__name__} as language model is not supported: it has no rotary_emb, "
                "which rotates survivors by their places"
            )
        outer = [item for item in compressors if item.site == "input"]
        if len(outer) > 1:
            names = ", ".join(str(item) for item in outer)
            raise SpecError(f"one compressor can act at the language model's input, got {len(outer)}: {names}")
        for item in compressors:
            self._check(item)
        self._interception = Interception(
            adapter, outer[0] if outer else None, self._cuts(), self._taps(outer), self._remember
        )
        self._record: Record | None = None
        self._report: Report | None = None

    # ------------------------------------------------------------------------------------------- for users

    @property
    def last(self) -> Report | None:
        """What the most recent call with visual inputs did; `None` before the first one."""
        if self._report is None and self._record is not None:
            self._report = make_report(self.spec, self._record, self.adapter)
        return self._report

    @property
    def spec(self) -> str:
        """The compressors, as specs joined by `+`."""
        return "+".join(str(item) for item in self.compressors)

    @property
    def active(self) -> bool:
        """Whether the compressors are still attached."""
        return self._interception.active

    def remove(self) -> None:
        """Detach. The model is as it was; reports stay readable."""
        self._interception.remove()

    def __enter__(self) -> Session:
        if not self.active:
            raise VtcError(f"{self!r} was undone or replaced; call vtc.compress(model, ...) again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self.active else "removed"
        return f"<vtc.Session {self.spec} on {type(self.adapter.multimodal).__name__}, {state}>"

    # ------------------------------------------------------------------------------------------- checks

    def _check(self, compressor: Compressor) -> None:
        encoder = self.adapter.encoder_info
        if compressor.site not in NEEDS:
            raise SpecError(f"{compressor.name} acts at site '{compressor.site}'; there is {' and '.join(NEEDS)}")
        if not isinstance(compressor.needs, set | frozenset):
            raise SpecError(
                f"{compressor.name}: needs is {compressor.needs!r}; it is a set, for example frozenset({{'features'}})"
            )
        known = NEEDS[compressor.site]
        unknown = compressor.needs - known
        if unknown:
            raise SpecError(f"{compressor.name} needs {sorted(unknown)}; a strategy can need {sorted(known)}")
        if compressor.needs & {"cls", "logits"} and not encoder.class_token:
            raise UnsupportedModelError(
                f"{compressor} reads the attention of a class token and this {type(self.adapter.encoder).__name__} has "
                f"none; {_alternatives(compressor)}"
            )
        limit = self.adapter.tokens_per_image
        if isinstance(compressor.keep, int) and limit is not None and compressor.keep > limit:
            raise SpecError(
                f"keep={compressor.keep} is more than the {limit} visual tokens of an image; use at most {limit}"
            )

    def _cuts(self) -> dict[int, Cut]:
        """The compressors inside the language model, by decoder layer."""
        layers, config = self.adapter.language_model.layers, self.adapter.language_model.config
        cuts: dict[int, Cut] = {}
        for item in self.compressors:
            if not isinstance(item, DecoderCompressor):
                continue
            if _sliding(config):
                raise UnsupportedModelError(
                    f"{item} acts inside a language model, and this one has sliding windows, or layers of another kind"
                )
            for stage, layer in enumerate(item.cuts(len(layers))):
                if layer in cuts:
                    raise SpecError(f"{cuts[layer].compressor} and {item} both act in front of decoder layer {layer}")
                if layer < self.adapter.first_cut:
                    raise SpecError(
                        f"{item} acts in front of decoder layer {layer}, but this model adds visual features up to "
                        f"layer {self.adapter.first_cut - 1}: layer={self.adapter.first_cut} is the first that works"
                    )
                if item.needs & {"attention", "ahead", "exchange"}:
                    check_layer(layers[layer])
                cuts[layer] = Cut(item, stage)
        return dict(sorted(cuts.items()))

    def _taps(self, outer: list[Compressor]) -> dict[int, Tap]:
        taps: dict[int, Tap] = {}
        for compressor in outer:
            kinds = sorted(compressor.needs & {"cls", "received", "logits"})
            if len(kinds) > 1:
                raise SpecError(f"{compressor.name} needs {' and '.join(kinds)}; a strategy reads one kind of row")
            for kind in kinds:
                for layer in compressor.layers(self.adapter.encoder_info):
                    taps[layer] = Tap(self.adapter.attention(layer), kind)  # type: ignore[arg-type]
        return taps

    # ------------------------------------------------------------------------------------------- attaching

    def _install(self) -> None:
        self._interception.install()

    def _remember(self, record: Record) -> None:
        self._record, self._report = record, None


def _alternatives(compressor: Compressor) -> str:
    """What works on an encoder without a class token: options of this strategy, and other strategies."""
    hints = get_type_hints(type(compressor))
    options = [
        str(other)
        for item in fields(compressor)
        if get_origin(hints[item.name]) is Literal
        for value in get_args(hints[item.name])
        if not (other := replace(compressor, **{item.name: value})).needs & {"cls", "logits"}
    ]
    others = [name for name in available() if name != "none" and not strategy(name)().needs & {"cls", "logits"}]
    return f"use {', '.join(options + others)}"


def _sliding(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None
