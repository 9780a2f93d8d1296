"""The oracle of the laws: decoder layers run one after the other by hand, on what a strategy was seen to select."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from combinations import Case
from families import Batch, extended
from vtc.compressor import Compressor, DecoderCompressor, parse
from vtc.selection import Selection
from vtc.visual import Layout, Visual

# Two orders of the same sums differ by rounding. Relative errors: some roundings of 2^-24, and of 2^-9.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def error(value: Tensor, expected: Tensor) -> float:
    """Relative error of `value`, in the Euclidean norm over everything."""
    return float((value.float() - expected.float()).norm() / expected.float().norm())


@dataclass(frozen=True)
class Call:
    """What a strategy saw, and what it answered."""

    layout: Layout
    features: Tensor  # (B, N, D)
    attention: Tensor | None  # (B, N)
    selection: Selection


@dataclass
class Recorder:
    """Compressors for `vtc.compress` that do what their specs say, and remember each call of `select`."""

    specs: list[str]
    compressors: list[Compressor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for spec in self.specs:
            self.calls.append([])
            self.compressors.append(_recording(spec, self.calls[-1]))

    def clear(self) -> None:
        for calls in self.calls:
            calls.clear()


def _recording(spec: str, calls: list[Call]) -> Compressor:
    made = parse(spec)

    class Recording(type(made)):  # type: ignore[misc]
        @property
        def needs(self) -> frozenset[str]:
            return super().needs | {"features"}

        def select(self, visual: Visual) -> Selection:
            selection = super().select(visual)
            attention = visual.attention if super().needs & {"attention", "ahead"} else None
            calls.append(Call(visual.layout, visual.features, attention, selection))
            return selection

    made.__class__ = Recording
    return made


@dataclass
class Answer:
    """What the language model says about one prompt.

    Attributes:
        logits: `(L, V)`, of the tokens that survive.
        places: `(L,)`, where these stand in the prompt without padding.
        kept: per visual input of the prompt, which of its tokens survive.
    """

    logits: Tensor
    places: Tensor
    kept: list[tuple[int, ...]]


@dataclass
class Tokens:
    """The tokens of one prompt that are left, and what the decoder layers need to know of them."""

    hidden: Tensor  # (L, D)
    deep: list[Tensor]  # (L, D) each, added behind the first layers; zero for text
    positions: Tensor  # (L,), or (3, L)
    places: Tensor  # (L,): where they stand in the prompt
    spots: list[Tensor]  # (n_i,) per visual input: numbers of its tokens among these

    def cut(self, calls: list[Call], contiguous: bool) -> None:
        stays = torch.ones(len(self.hidden), dtype=torch.bool)
        streams = [self.hidden, *self.deep]
        changed = [stream.clone() for stream in streams]
        for number, spot in enumerate(self.spots):
            found = find(calls, self.hidden[spot])
            if found is not None:
                call, entry = found
                weights, left = call.selection.matrix()[entry], spot[call.selection.index[entry]]  # (K, N), (K,)
                for before, after in zip(streams, changed, strict=True):
                    after[left] = (weights @ before[spot].float()).to(after.dtype)
                stays[spot] = False
                stays[left] = True
                self.spots[number] = left
        gone = (~stays).cumsum(0)
        self.spots = [spot - gone[spot] for spot in self.spots]
        self.positions = (self.positions - gone if contiguous else self.positions)[..., stays]
        self.places = self.places[stays]
        self.hidden, *self.deep = (stream[stays] for stream in changed)


def find(calls: list[Call], rows: Tensor) -> tuple[Call, int] | None:
    """The call in which a visual input with these features, `(N, D)`, was looked at; `None` if it was left alone."""
    seen = [(call, entry) for call in calls if call.layout.tokens == len(rows) for entry in range(len(call.features))]
    if not seen or not len(rows):
        return None
    best = min(seen, key=lambda item: error(item[0].features[item[1]], rows))
    assert error(best[0].features[best[1]], rows) < CLOSE[rows.dtype], "the strategy saw other features"
    return best


def heard(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments that an uncompressed model hands to its language model."""
    given: dict[str, Any] = {}
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    return given


def true_positions(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """`(S,)`, or `(3, S)` for models with coordinates: of one prompt without padding."""
    plain = torch.arange(inputs["input_ids"].shape[1])
    if not hasattr(model.model, "get_rope_index"):
        return plain
    if not any(name.endswith("grid_thw") for name in inputs):
        return plain.expand(3, -1)
    given = {name: value for name, value in inputs.items() if "pixel" not in name and name != "attention_mask"}
    return model.model.get_rope_index(**given)[0][:, 0]


@torch.no_grad()
def by_hand(case: Case, batch: Batch, number: int, recorder: Recorder, more: Tensor | None = None) -> Answer:
    """Run the decoder layers on what is left of prompt `number`, and of text `more` `(T,)` after it."""
    shown = case.model()
    maps = any("attention" in c.needs or "ahead" in c.needs for c in recorder.compressors)
    model = case.family.model("eager", case.dtype) if maps else shown  # the same weights; eager shows its maps
    coordinates = hasattr(model.model, "get_rope_index")
    more = torch.zeros(0, dtype=torch.long) if more is None else more
    hide = None
    if len(more) and any(getattr(compressor, "truncate", False) for compressor in recorder.compressors):
        hide = by_hand(case, batch, number, recorder).places

    row, padding = batch.rows[number], batch.padding(number)
    tokens = Tokens(
        hidden=torch.cat([heard(shown, batch.inputs())["inputs_embeds"][number, padding:], embed(model, more)]),
        deep=deep_features(shown, batch, number, len(more)),
        positions=true_positions(model, extended(batch.alone(number), more[None])),
        places=torch.arange(len(row.ids) + len(more)),
        spots=[torch.tensor(item.places) for item in row.shown],
    )
    for compressor, calls in zip(recorder.compressors, recorder.calls, strict=True):
        if not isinstance(compressor, DecoderCompressor):
            tokens.cut(calls, compressor.positions == "contiguous" and not coordinates)

    layers, attention = model.model.language_model.layers, torch.zeros(0)
    for index, layer in enumerate(layers):
        for compressor, calls in zip(recorder.compressors, recorder.calls, strict=True):
            if isinstance(compressor, DecoderCompressor) and index in compressor.cuts(len(layers)):
                looked = run(model, layer, tokens, len(row.ids), None)[1] if "ahead" in compressor.needs else attention
                check_attention(calls, tokens, looked, len(row.ids) - 1)
                tokens.cut(calls, compressor.positions == "contiguous" and not coordinates)
        tokens.hidden, attention = run(model, layer, tokens, len(row.ids), hide)
        if index < len(tokens.deep):
            tokens.hidden = tokens.hidden + tokens.deep[index]

    logits = model.lm_head(model.model.language_model.norm(tokens.hidden[None]))[0]
    kept = [
        tuple(item.places.index(place) for place in tokens.places[spot].tolist())
        for item, spot in zip(row.shown, tokens.spots, strict=True)
    ]
    return Answer(logits, tokens.places, kept)


def embed(model: Any, ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(ids)


def deep_features(model: Any, batch: Batch, number: int, more: int) -> list[Tensor]:
    """What a model adds to the visual tokens behind its first layers, as `(S, D)` with zeros for text."""
    given = heard(model, batch.inputs())
    mask, padding = given.get("visual_pos_masks"), batch.padding(number)
    if mask is None:
        return []
    out = []
    for feature in given["deepstack_visual_embeds"]:
        full = feature.new_zeros(*mask.shape, feature.shape[-1])
        full[mask] = feature
        out.append(torch.nn.functional.pad(full[number, padding:], (0, 0, 0, more)))
    return out


def run(model: Any, layer: Any, tokens: Tokens, prompt: int, hide: Tensor | None) -> tuple[Tensor, Tensor]:
    """`(L, D)`, the output of one decoder layer, and `(L, L)`, its attention averaged over heads if it is eager.

    `hide`: text behind the `prompt` sees no tokens of it but those in these places.
    """
    length, kind = len(tokens.hidden), tokens.hidden.dtype
    blocked = torch.ones(length, length, dtype=torch.bool).triu(1)
    if hide is not None:
        gone = (tokens.places < prompt) & ~torch.isin(tokens.places, hide)
        blocked |= (tokens.places >= prompt)[:, None] & gone
    mask = torch.zeros(1, 1, length, length, dtype=kind).masked_fill(blocked, torch.finfo(kind).min)
    hidden = tokens.hidden[None]
    rotation = model.model.language_model.rotary_emb(hidden, position_ids=tokens.positions.unsqueeze(-2))
    seen: list[Tensor] = []
    handle = layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    out = layer(hidden, attention_mask=mask, position_embeddings=rotation)
    handle.remove()
    return out[0], torch.zeros(0) if seen[0] is None else seen[0][0].float().mean(0)


def check_attention(calls: list[Call], tokens: Tokens, attention: Tensor, last: int) -> None:
    """The scores that a strategy saw are the last row of the eager map."""
    line = int((tokens.places == last).nonzero())
    for spot in tokens.spots:
        found = find(calls, tokens.hidden[spot])
        if found is not None and found[0].attention is not None:
            expected = attention[line, spot]
            assert error(found[0].attention[found[1]], expected) < CLOSE[tokens.hidden.dtype]
