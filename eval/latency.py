"""Time to first token and its parts, decoding speed, and the size of the key-value cache.

How it is measured. Time to first token is one `model(**inputs, use_cache=True, logits_to_keep=1)` and the argmax of its
logits: the work that `generate` does for its first token, without its set-up, which is the same for all settings. Then
tokens are fed back one at a time with the cache. CUDA events on a GPU, `perf_counter` elsewhere; medians and
interquartile ranges over repeats, after a warm-up.

Every repeat measures the uncompressed model, the setting and the ideal one after the other, so whatever slows the
machine down slows all three, and ratios stay true when milliseconds do not.

Selection is timed in front of the language model and inside it. What a strategy reads of the vision encoder is computed
in there, and is part of the encoder's time.

The *ideal* is the uncompressed model's time with its language model's share replaced by that of the bare language model
on random embeddings of the setting's length: what would be possible if the tokens had never been there. The distance to
it is the cost of choosing and removing tokens.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

from vtc.adapters import Adapter, find

PARTS = ("encoder", "projector", "selection", "prefill")
WARMUP = 2
REPEATS = 9
DECODE_TOKENS = 16


@dataclass(frozen=True)
class Latency:
    """What `measure` found, in milliseconds; the field names are those of the result rows."""

    ttft_ms: float
    ttft_iqr_ms: float
    encoder_ms: float
    projector_ms: float
    selection_ms: float  # choosing and removing tokens, in front of the language model and of its layers
    prefill_ms: float  # the language model without that, and the logits of one token
    other_ms: float  # filling placeholders, and Python in between
    ideal_ttft_ms: float
    baseline_ttft_ms: float  # of the uncompressed model, in the same loop
    ttft_speedup: float  # median over repeats of baseline / this
    decode_tokens_per_s: float
    baseline_decode_tokens_per_s: float
    kv_cache_bytes: int  # per sequence, all layers, after the prompt
    peak_memory_bytes: int | None  # CUDA only


@dataclass(frozen=True)
class Run:
    """One prompt and a few generated tokens; milliseconds."""

    parts: dict[str, float]
    ttft: float
    decode: float  # all generated tokens but the first
    length: int  # of the sequence in the language model
    images: int  # that the encoder saw
    cache_bytes: int
    peak: int | None


class Clock:
    """Points in time, on the device's own clock, and the memory it has used. A GPU need not be the current one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds. On a GPU, `wait` first."""
        return start.elapsed_time(end) if self.cuda else (end - start) * 1000

    def forget_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        """The most bytes in use since `forget_peak`, weights included; CUDA only."""
        return torch.cuda.max_memory_allocated(self.device) if self.cuda else None


class Stopwatch(AbstractContextManager["Stopwatch"]):
    """Notes when each part of a forward pass begins and ends. Enter it after compressing, so that its hooks enclose.

    Selection is what happens between the first and the last pre-hook of the language model, and of those of its layers
    that have any: attention is read there, tokens leave there. What strategies read of the encoder is computed by hooks
    inside it, and is part of the encoder's time.
    """

    def __init__(self, adapter: Adapter, clock: Clock) -> None:
        self.adapter, self.clock = adapter, clock
        self.spans: list[tuple[str, Any, Any]] = []
        self.open: dict[str, Any] = {}
        self.length = self.images = 0

    def __enter__(self) -> Stopwatch:
        encoder, projector, model = self.adapter.encoder, self.adapter.projector, self.adapter.language_model
        self.handles = [
            encoder.register_forward_pre_hook(self._look, prepend=True, with_kwargs=True),
            encoder.register_forward_hook(self._end("encoder")),
            projector.register_forward_pre_hook(self._begin("projector"), prepend=True),
            projector.register_forward_hook(self._end("projector")),
            # First of all pre-hooks and last of all: between the two, tokens are chosen and removed.
            model.register_forward_pre_hook(self._begin("selection"), prepend=True),
            model.register_forward_pre_hook(self._arrive, with_kwargs=True),
        ]
        for layer in model.layers:
            if layer._forward_pre_hooks:
                self.handles.append(layer.register_forward_pre_hook(self._begin("inside"), prepend=True))
                self.handles.append(layer.register_forward_pre_hook(self._end("inside")))
        return self

    def __exit__(self, *args: object) -> None:
        for handle in self.handles:
            handle.remove()

    def close(self, name: str) -> None:
        """End a part now."""
        if name in self.open:
            self.spans.append((name, self.open.pop(name), self.clock.now()))

    def parts(self) -> dict[str, float]:
        """Milliseconds per part; 0 for a part that did not run."""
        total = dict.fromkeys((*PARTS, "inside"), 0.0)
        for name, start, end in self.spans:
            total[name] += self.clock.between(start, end)
        if any(module is self.adapter.projector for module in self.adapter.encoder.modules()):
            total["encoder"] -= total["projector"]
        inside = total.pop("inside")  # the language model
        return {**total, "selection": total["selection"] + inside, "prefill": total["prefill"] - inside}

    def _begin(self, name: str) -> Callable[..., None]:
        def hook(*args: object) -> None:
            self.open[name] = self.clock.now()

        return hook

    def _end(self, name: str) -> Callable[..., None]:
        return lambda *args: self.close(name)

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.images += next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value)).shape[0]
        self.open["encoder"] = self.clock.now()

    def _arrive(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.close("selection")
        self.length = kwargs["inputs_embeds"].shape[1]
        self.open["prefill"] = self.clock.now()


@torch.no_grad()
def run(model: Any, inputs: dict[str, torch.Tensor], tokens: int = 1) -> Run:
    """Read the prompt and generate `tokens` tokens with `model`, compressed or not."""
    clock = Clock(model.device)
    # generate drops a mask without padding; a mask would cost a check in the model.
    inputs = {k: v for k, v in inputs.items() if k != "attention_mask" or not bool((v == 1).all())}
    clock.forget_peak()
    with Stopwatch(find(model), clock) as watch:
        clock.wait()
        start = clock.now()
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)  # (B, 1)
        watch.close("prefill")
        first = clock.now()
    cache = output.past_key_values
    batch = token.shape[0]
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // batch
    peak = clock.peak()
    clock.wait()
    begin = clock.now()
    for _ in range(tokens - 1):
        output = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
    end = clock.now()
    clock.wait()
    return Run(
        parts=watch.parts(),
        ttft=clock.between(start, first),
        decode=clock.between(begin, end),
        length=watch.length,
        images=watch.images,
        cache_bytes=size,
        peak=peak,
    )


@torch.no_grad()
def bare_prefill(model: Any, batch: int, length: int) -> float:
    """Milliseconds of the bare language model and one row of logits on random embeddings `(batch, length, D)`."""
    adapter, clock = find(model), Clock(model.device)
    weight = model.get_input_embeddings().weight
    embeddings = weight.std() * torch.randn(batch, length, weight.shape[1], dtype=weight.dtype, device=weight.device)
    clock.wait()
    start = clock.now()
    hidden = adapter.language_model(inputs_embeds=embeddings, use_cache=True).last_hidden_state
    model.get_output_embeddings()(hidden[:, -1:]).argmax(-1)
    end = clock.now()
    clock.wait()
    return clock.between(start, end)


def _bare_layers(model: Any, batch: int, session: Any, length: int) -> float:
    """`bare_prefill` of a sequence that was always as short as each decoder layer saw it: the mean over layers."""
    report = getattr(session, "last", None)
    lengths = Counter([length] if report is None else report.lengths)
    return sum(count * bare_prefill(model, batch, one) for one, count in lengths.items()) / lengths.total()


def measure(
    model: Any,
    inputs: dict[str, torch.Tensor],
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext,
    *,
    baseline: dict[str, torch.Tensor] | None = None,
    repeats: int = REPEATS,
    warmup: int = WARMUP,
    decode_tokens: int = DECODE_TOKENS,
) -> Latency:
    """Time one setting against the uncompressed model, interleaved.

    Args:
        model: an uncompressed model.
        inputs: one batch of prompts, without padding.
        setting: makes the context in which the model is compressed, for example `lambda: vtc.compress(model, spec)`.
        baseline: inputs of the uncompressed model, if they are not `inputs`: there the picture is smaller, or missing.
        repeats: measurements that count, at least two.
        warmup: measurements before that, which do not; fewer than `repeats`.
        decode_tokens: tokens generated in each, the first included.
    """
    same, baseline = baseline is None, inputs if baseline is None else baseline
    bare: list[Run] = []
    ours: list[Run] = []
    ideal: list[float] = []
    batch = inputs["input_ids"].shape[0]
    warmup = min(warmup, repeats - 1)
    for repeat in range(warmup + repeats):
        # Each timed run follows an untimed one: the first call of a session checks its selection, later calls do not.
        run(model, baseline)
        reference = run(model, baseline, decode_tokens)
        with setting() as session:
            run(model, inputs)
            mine = run(model, inputs, decode_tokens)
        # With a smaller picture, or none (the blind floor), encoder and projector do as little in the ideal.
        around = reference if same else mine
        short = around.ttft - around.parts["prefill"] + _bare_layers(model, batch, session, mine.length)
        if repeat >= warmup:
            bare.append(reference)
            ours.append(mine)
            ideal.append(short)
    low, _, high = quantiles([one.ttft for one in ours], n=4)
    parts = {f"{part}_ms": median(one.parts[part] for one in ours) for part in PARTS}
    return Latency(
        ttft_ms=median(one.ttft for one in ours),
        ttft_iqr_ms=high - low,
        other_ms=median(one.ttft - sum(one.parts.values()) for one in ours),
        ideal_ttft_ms=median(ideal),
        baseline_ttft_ms=median(one.ttft for one in bare),
        ttft_speedup=median(b.ttft / o.ttft for b, o in zip(bare, ours, strict=True)),
        decode_tokens_per_s=_speed(ours, decode_tokens, batch),
        baseline_decode_tokens_per_s=_speed(bare, decode_tokens, batch),
        kv_cache_bytes=ours[-1].cache_bytes,
        peak_memory_bytes=max(one.peak for one in ours if one.peak is not None) if ours[-1].peak else None,
        **parts,
    )


def _speed(runs: list[Run], tokens: int, batch: int) -> float:
    """Tokens per second over the whole batch."""
    return median(batch * (tokens - 1) * 1000 / one.decode for one in runs)
