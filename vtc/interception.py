"""The hooks: how tokens leave a call of the model on their way, and how the call gets its shapes back."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from vtc.adapters.base import Adapter
from vtc.boundary import (
    Shrink,
    Stretch,
    bind,
    check_croppable,
    cut_deepstack,
    entry_arguments,
    gapless,
    is_flat,
    open_stretch,
    put_back,
    truncate,
)
from vtc.cache import CacheState, attend, cache_state, set_cache_state
from vtc.call import Call, Record, Seen, Stage
from vtc.choice import Group, choose
from vtc.compressor import Compressor, DecoderCompressor
from vtc.decoder import Probe, exchanged_attention, last_token_attention
from vtc.encoding import MODALITIES, EncoderWatch
from vtc.errors import WITHOUT_HOOKS, VtcError, refuse_copies
from vtc.inputs import Inputs, visual_inputs
from vtc.saliency import Tap
from vtc.visual import Layout, Visual


@dataclass(frozen=True)
class Cut:
    """One compressor in front of one decoder layer; `stage` counts its cuts."""

    compressor: DecoderCompressor
    stage: int


class Interception:
    """Hooks on one model.

    Args:
        adapter: of the model.
        outer: the compressor at the language model's input, if any.
        cuts: the compressors inside, by decoder layer.
        taps: readers of the vision encoder's attention, by layer.
        remember: called with the record of each call that had visual inputs.
    """

    def __init__(
        self,
        adapter: Adapter,
        outer: Compressor | None,
        cuts: Mapping[int, Cut],
        taps: Mapping[int, Tap],
        remember: Callable[[Record], None],
    ) -> None:
        self._adapter, self._outer, self._cuts, self._taps, self._remember = adapter, outer, cuts, taps, remember
        self._truncates = any(cut.compressor.truncate for cut in cuts.values())
        self._encoder = EncoderWatch(adapter, taps, self._encoded)
        self._handles: list[RemovableHandle] = []
        self._local = threading.local()
        self._validated: set[int] = set()

    __reduce__ = refuse_copies

    @property
    def active(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    def install(self) -> None:
        adapter, handles = self._adapter, self._handles
        model = adapter.language_model
        handles.append(adapter.multimodal.register_forward_pre_hook(self._enter, with_kwargs=True))
        handles.append(adapter.multimodal.register_forward_hook(self._leave, always_call=True))
        for tap in self._taps.values():
            handles += tap.install()
        self._encoder.install()
        handles.append(model.register_forward_pre_hook(self._shrink, with_kwargs=True))
        # Before the hooks of others, who know no other length than the old one.
        handles.append(model.register_forward_hook(self._grow, prepend=True, with_kwargs=True, always_call=True))
        handles.append(model.rotary_emb.register_forward_pre_hook(self._rotate, with_kwargs=True))
        for number, layer in enumerate(model.layers if self._cuts else []):
            if number >= min(self._cuts) - 1:
                handles.append(layer.register_forward_pre_hook(partial(self._layer, number), with_kwargs=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._encoder.remove()
        self._local = threading.local()

    # ------------------------------------------------------------------------------------------- hooks, in order

    @property
    def _call(self) -> Call | None:
        """The call that this thread is in. Calls of one model do not nest, so a new one replaces an interrupted one."""
        return getattr(self._local, "call", None)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self._adapter.multimodal:
            raise VtcError(
                f"this {type(module).__name__} is a copy of the compressed one, as torch.nn.DataParallel makes: use "
                "one process per device, or compress the copy"
            )
        arguments = bind(module, args, kwargs)
        ahead = arguments.get("mm_encoder_outputs") or {}  # what generate, or the caller, encoded before this call
        self._local.call = Call(
            input_ids=arguments.get("input_ids"),
            inputs_embeds=arguments.get("inputs_embeds"),
            has_pixels=any(arguments.get(name) is not None for name in ("pixel_values", "pixel_values_videos")),
            encoded={modality: ahead[modality] for modality in MODALITIES if ahead.get(modality) is not None},
        )

    def _encoded(self, modality: str, output: Any) -> None:
        if self._call is not None and self._call.has_pixels:
            self._call.encoded[modality] = output

    def _shrink(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._call is None:
            self._local.call = Call(alone=True)
        call = self._local.call
        if call.has_pixels and not call.encoded:
            raise VtcError("pixel values were given but the vision encoder never ran, so nothing could be dropped")
        arguments = bind(module, args, kwargs)
        cache, mask = arguments.get("past_key_values"), arguments.get("attention_mask")
        call.state = state = cache_state(cache)
        if state is None and not call.encoded:
            return None
        self._check_cache(cache, state)
        attend(cache, True)
        call.cache = cache
        call.own_mask = not (mask is None or is_flat(mask) or getattr(cache, "is_compileable", False))
        stretch, shrink = open_stretch(arguments, state), None
        if call.encoded:
            arguments, stretch, shrink = self._select(call, arguments, stretch)
        call.stretches = [stretch]
        if shrink is None and state is None:
            return None
        call.positions = stretch.positions
        return (), entry_arguments(arguments, stretch, shrink, state)

    def _rotate(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._call is None or self._call.positions is None:
            return None
        self._call.rotated = True
        return (), {**bind(module, args, kwargs), "position_ids": self._call.positions}

    def _layer(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """In front of decoder layer `number`: perhaps a cut, and from the first cut on other masks and rotations."""
        call = self._call
        if call is None or not call.stretches:
            return None
        arguments = {**bind(module, args, kwargs), **call.layer_arguments}
        cut, state = self._cuts.get(number), call.state
        if cut is not None:
            call.reached += 1
            _refuse_replays(module)
            device = arguments["hidden_states"].device  # layers may be spread over several
            call.stretches[-1] = call.stretches[-1].to(device)
            call.places = None if call.places is None else call.places.to(device)
        if state is not None and any(part.first == number for part in state.parts[1:]):
            arguments = self._begin(call, call.stretches[-1].enter(number, state), arguments, None)
        if cut is not None and call.places is not None and any(call.left):
            arguments = self._cut(call, number, cut, arguments)
        call.seen = None
        if number + 1 in self._cuts and call.places is not None:
            filled = not (module.training and getattr(module, "gradient_checkpointing", False))
            hidden, rotation = arguments["hidden_states"], arguments["position_embeddings"]
            call.seen = Seen(number, hidden, rotation, call.stretches[-1], filled)
        if not call.layer_arguments:
            return None
        hidden = arguments.pop("hidden_states")  # positional, as checkpointing wants it
        return (hidden,), arguments

    def _grow(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call = self._call
        if call is None:
            return None
        attend(call.cache, False)
        if call.alone:  # nobody else ends this call
            self._local.call = None
        return self._finish(call, output) if call.stretches and output is not None else None

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        call, self._local.call = self._call, None
        if call is not None and call.encoded and output is not None:
            raise VtcError(f"the language model {WITHOUT_HOOKS}")

    # ------------------------------------------------------------------------------------------- at the entry

    def _check_cache(self, cache: Any, state: CacheState | None) -> None:
        if state is not None and any(part.first not in self._cuts for part in state.parts[1:]):
            raise VtcError(
                "this cache was compressed inside the language model, by other compressors than the present ones; "
                "continue it under those"
            )
        if self._truncates:
            check_croppable(cache)

    def _select(
        self, call: Call, arguments: dict[str, Any], stretch: Stretch
    ) -> tuple[dict[str, Any], Stretch, Shrink | None]:
        """Find the visual inputs of the call, and let the outer compressor choose among their tokens."""
        embeds = arguments["inputs_embeds"]
        masks = self._adapter.placeholders(call.input_ids, call.inputs_embeds)
        masks = {modality: mask.to(embeds.device) for modality, mask in masks.items()}
        inputs = visual_inputs(self._adapter, call.encoded, masks, stretch.now)
        call.encoded = {}
        call.layouts, call.modalities, call.places = inputs.layouts, inputs.modalities, inputs.places
        call.left = [layout.tokens for layout in inputs.layouts]
        groups: Sequence[Group] = ()
        if self._outer is not None:
            budgets = [self._outer.budget(layout) for layout in inputs.layouts]
            groups = self._choose(self._outer, inputs.layouts, budgets, partial(self._look_outside, inputs))
            call.stages.append(Stage(str(self._outer), 0, groups))
        if (groups or self._cuts) and arguments.get("output_attentions"):
            raise VtcError("a compressed call has no attention maps of the full length: call without output_attentions")
        if not groups:
            return arguments, stretch, None
        before = call.places.spots
        stretch, shrink, embeds = self._drop(call, self._outer, stretch, embeds, groups)
        arguments = cut_deepstack(arguments, before, call.places, groups, shrink)
        return {**arguments, "inputs_embeds": embeds}, stretch, shrink

    def _look_outside(self, inputs: Inputs, layout: Layout, members: list[int], budget: int) -> Visual:
        """What a compressor at the language model's input sees of some visual inputs."""
        needs = self._outer.needs if self._outer is not None else frozenset()
        loaders: dict[str, Callable[[], Tensor]] = {}
        if "features" in needs:
            loaders["features"] = lambda: torch.stack([inputs.features[i] for i in members]).detach()
        if self._taps:
            loaders["saliency"] = lambda: torch.stack(
                [torch.stack([inputs.rows[layer][i] for layer in self._taps]) for i in members]
            )
        return Visual(layout, len(members), inputs.features[members[0]].device, loaders, budget)

    # ------------------------------------------------------------------------------------------- at a cut

    def _cut(self, call: Call, number: int, cut: Cut, arguments: dict[str, Any]) -> dict[str, Any]:
        """Choose and drop in front of a layer; returns its arguments."""
        compressor, hidden, stretch = cut.compressor, arguments["hidden_states"], call.stretches[-1]
        arrived = call.arrived.setdefault(id(compressor), list(call.left))
        layouts = [Layout.frames(1, 1, count) for count in call.left]
        budgets = [compressor.budgets(Layout.frames(1, 1, count))[cut.stage] if count else 0 for count in arrived]
        assert call.places is not None
        places = call.places
        seen = call.seen
        if "ahead" in compressor.needs:
            seen = Seen(number, hidden, arguments["position_embeddings"], stretch, filled=False)
        cache = arguments.get("past_key_values")

        @functools.cache
        def scores() -> Tensor:
            assert seen is not None
            probe = Probe(
                self._adapter.language_model.layers[seen.layer],
                seen.hidden,
                seen.rotation,
                seen.stretch.mask(len(hidden)),
                seen.stretch.past,
                cache,
                seen.filled and cache is not None,
            )
            if "exchange" in compressor.needs:
                return exchanged_attention(probe, places.flags(hidden.shape[:2]))
            return last_token_attention(probe)[:, probe.past :]  # (B, K)

        def look(layout: Layout, members: list[int], budget: int) -> Visual:
            place = torch.stack([places.spots[i] for i in members])  # (I, n)
            loaders = {
                "features": lambda: hidden.detach().flatten(0, 1)[place],
                "attention": lambda: scores().flatten()[place],
                "exchange": lambda: scores()[torch.div(place[:, 0], hidden.shape[1], rounding_mode="floor")],
            }
            wanted = {"attention" if need == "ahead" else need for need in compressor.needs}
            chosen = {name: load for name, load in loaders.items() if name in wanted}
            return Visual(layout, len(members), hidden.device, chosen, budget)

        with torch.no_grad():
            groups = self._choose(compressor, layouts, budgets, look)
        call.stages.append(Stage(str(compressor), number, groups))
        if not groups:
            return arguments
        stretch = stretch if stretch.first == number else stretch.enter(number, call.state)
        stretch, shrink, hidden = self._drop(call, compressor, stretch, hidden, groups)
        return self._begin(call, stretch, {**arguments, "hidden_states": hidden}, shrink)

    def _begin(self, call: Call, stretch: Stretch, arguments: dict[str, Any], shrink: Shrink | None) -> dict[str, Any]:
        """From this layer on, layers see the tokens of `stretch`; returns the arguments of the first of them."""
        model, hidden, cache = (
            self._adapter.language_model,
            arguments["hidden_states"],
            arguments.get("past_key_values"),
        )
        mask, flat = arguments.get("attention_mask"), stretch.mask(len(hidden))
        same = stretch.first == call.stretches[-1].first
        call.stretches[-1 if same else len(call.stretches) :] = [stretch]
        if call.own_mask and shrink is not None and mask is not None:
            mask = shrink.take_mask(mask, stretch.past)
        else:
            mask = create_causal_mask(
                config=model.config,
                inputs_embeds=hidden,
                attention_mask=flat,
                past_key_values=cache,
                layer_idx=stretch.first,
                # To find out whether the mask hides anything, transformers would wait for the device.
                allow_is_causal_skip=flat is None and not getattr(cache, "is_compileable", False),
            )
        rotation = arguments["position_embeddings"]
        if shrink is not None or stretch.renumbered:
            call.positions = stretch.positions
            rotation = model.rotary_emb(hidden, position_ids=stretch.positions)
        call.layer_arguments = {
            "attention_mask": mask,
            "position_embeddings": rotation,
            "position_ids": gapless(stretch),
        }
        return {**arguments, **call.layer_arguments}

    # ------------------------------------------------------------------------------------------- anywhere

    def _choose(
        self,
        compressor: Compressor,
        layouts: Sequence[Layout],
        budgets: Sequence[int],
        look: Callable[[Layout, list[int], int], Visual],
    ) -> list[Group]:
        groups = choose(compressor, layouts, budgets, look, validate=id(compressor) not in self._validated)
        self._validated.add(id(compressor))
        return groups

    def _drop(
        self, call: Call, compressor: Compressor | None, stretch: Stretch, x: Tensor, groups: Sequence[Group]
    ) -> tuple[Stretch, Shrink, Tensor]:
        assert call.places is not None and compressor is not None
        x, kept, shrink = call.places.drop(x, stretch.now, groups)
        for group in groups:
            for member in group.members:
                call.left[member] -= group.dropped
        numbering = "original" if self._adapter.coordinates else compressor.positions
        return stretch.cut(shrink, kept, numbering), shrink, x

    # ------------------------------------------------------------------------------------------- at the end

    def _finish(self, call: Call, output: Any) -> Any:
        """Bring the language model's output to its old length, and note what its cache lacks."""
        if call.positions is not None and not call.rotated:
            raise VtcError(f"the rotary embedding {WITHOUT_HOOKS}")
        if call.reached < len(self._cuts):
            raise VtcError(f"decoder layer {list(self._cuts)[call.reached]} {WITHOUT_HOOKS}")
        stretches = call.stretches
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        first, batch = stretches[0], len(hidden)
        size = first.length if first.back is None else first.back.shape[1]
        if isinstance(output, tuple):
            cache = next((item for item in output[1:] if hasattr(item, "get_seq_length")), None)
        else:
            cache = getattr(output, "past_key_values", None)
        # Where a row of text is the longest, a batch is as long as before, but rows stand elsewhere.
        if cache is not None and (call.state is not None or any(stretch.back is not None for stretch in stretches)):
            length = first.past + first.dropped - (0 if first.back is None else size - first.length)
            floor = stretches[-1].floor(length)
            if stretches[-1].back is None and call.state is not None:
                floor = call.state.floor
            held = stretches
            if self._truncates and call.layouts:
                check_croppable(cache)
                held = truncate(cache, stretches, self._last_truncation())
            set_cache_state(cache, CacheState(length + size, floor, tuple(part.part(batch) for part in held)))
        if call.layouts:
            spans = tuple((stretch.first, stretch.length) for stretch in stretches)
            self._remember(Record(call.layouts, call.modalities, tuple(call.stages), batch, size, spans))
        return self._put_back(output, stretches)

    def _last_truncation(self) -> int:
        return max(number for number, cut in self._cuts.items() if cut.compressor.truncate)

    def _put_back(self, output: Any, stretches: Sequence[Stretch]) -> Any:
        def full(x: Tensor, stretch: Stretch) -> Tensor:
            return x if stretch.back is None else put_back(x, stretch.back)

        last = stretches[-1]
        if isinstance(output, tuple):
            return (full(output[0], last), *output[1:])
        output.last_hidden_state = full(output.last_hidden_state, last)
        states = getattr(output, "hidden_states", None)
        if states is not None:  # the input of the first layer, then the output of each layer
            ran = [[s for s in stretches if s.first <= max(entry - 1, 0)][-1] for entry in range(len(states))]
            output.hidden_states = tuple(
                x if x is None else full(x, stretch) for x, stretch in zip(states, ran, strict=True)
            )
        return output


def _refuse_replays(layer: nn.Module) -> None:
    """Raise if checkpointing would run the hooks of a decoder layer again in the backward pass, without their call."""
    if (
        layer.training
        and getattr(layer, "gradient_checkpointing", False)
        and "__call__" in vars(GradientCheckpointingLayer)
    ):
        raise VtcError(
            "gradient checkpointing of this transformers release repeats the hooks of a layer in the backward pass, "
            "which a compressor inside the language model cannot follow: use a newer release, or one in front of it"
        )
