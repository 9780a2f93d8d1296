"""Dropping inside the language model, against its decoder layers called one by one by hand, with a cache."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

import vtc
from families import (
    FAMILIES,
    GREEDY,
    IMAGE,
    LAYERS,
    ONE_IMAGE,
    TEXT,
    TWO_IMAGES,
    WIDTH,
    Batch,
    Family,
    Row,
    extended,
    llama,
    llava,
    qwen2,
)
from oracle import CLOSE, deep_features, error, heard, true_positions
from vtc import decoder
from vtc.compressor import DecoderCompressor, LayerCompressor
from vtc.selection import Selection
from vtc.visual import Layout, Visual

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
plain_families = pytest.mark.parametrize("name", ["llava", "llava-siglip", "llava-next", "internvl"])
every_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])
INNER = ["fastv:keep=5,layer=1", "pyramiddrop:keep=3,stages=2", "holitom-inner:keep=5", "todre-inner"]
every_inner = pytest.mark.parametrize("spec", INNER)


def near(value: Tensor, expected: Tensor) -> bool:
    return error(value, expected) < CLOSE[value.dtype]


@dataclass(kw_only=True)
class Even(DecoderCompressor):
    """Keep every other token of what is left, in front of each layer in `at`: a choice that no content changes."""

    name: ClassVar[str] = "even"

    at: tuple[int, ...] = (2,)

    def _check_types(self) -> None: ...

    def cuts(self, depth: int) -> tuple[int, ...]:
        return self.at

    def budget(self, layout: Layout) -> int:
        return self.budgets(layout)[-1]

    def budgets(self, layout: Layout) -> tuple[int, ...]:
        left = [layout.tokens]
        for _ in self.at:
            left.append((left[-1] + 1) // 2)
        return tuple(left[1:])

    def select(self, visual: Visual) -> Selection:
        index = torch.arange(0, visual.layout.tokens, 2)
        return Selection.keep(index.expand(visual.inputs, -1), visual.layout.tokens)


@dataclass
class Hand:
    """Decoder layers on one prompt without padding, with a plain cache; `even` says where every other token goes."""

    model: Any
    even: Even
    cache: Any = field(default_factory=DynamicCache)
    said: int = 0  # tokens of all earlier calls
    moved: list[int] = field(default_factory=lambda: [0] * LAYERS)  # how far later positions move up, by layer
    alive: list[list[int]] = field(default_factory=list)  # places in the last call that each layer saw
    states: list[Tensor] = field(default_factory=list)  # what came out of each layer then

    @torch.no_grad()
    def feed(
        self, hidden: Tensor, spots: Sequence[Sequence[int]] = (), positions: Tensor | None = None, deep: Any = ()
    ) -> Tensor:
        """`(K, V)`: logits of what is left of `hidden` `(S, D)`.

        `spots` are the places of each visual input, `positions` `(S,)` or `(3, S)`, `deep` `(S, D)` per first layer.
        """
        text, size = self.model.model.language_model, len(hidden)
        positions = torch.arange(self.said, self.said + size) if positions is None else positions
        places, left = list(range(size)), [list(spot) for spot in spots]
        self.alive, self.states = [], []
        for number, layer in enumerate(text.layers):
            if number in self.even.at:
                gone = {place for spot in left for place in spot[1::2]}
                left = [spot[::2] for spot in left]
                hidden = hidden[[place not in gone for place in places]]
                places = [place for place in places if place not in gone]
            true = positions[..., places]
            if self.even.positions == "contiguous":
                true = true - self.moved[number] - (torch.tensor(places) - torch.arange(len(places)))
                self.moved[number] += size - len(places)
            past = self.held(number)
            blocked = torch.ones(len(places), past + len(places), dtype=torch.bool).triu(1 + past)
            mask = torch.zeros(blocked.shape, dtype=hidden.dtype).masked_fill(blocked, torch.finfo(hidden.dtype).min)
            rotation = text.rotary_emb(hidden[None], position_ids=true.unsqueeze(-2))
            hidden = layer(
                hidden[None],
                attention_mask=mask[None, None],
                position_embeddings=rotation,
                past_key_values=self.cache,
                use_cache=True,
            )[0]
            self.alive.append(places)
            self.states.append(hidden)
            if number < len(deep):
                hidden = hidden + deep[number][places]
        if self.even.truncate:
            self._truncate(size)
        self.said += size
        return self.model.lm_head(text.norm(hidden[None]))[0]

    def held(self, layer: int) -> int:
        layers = self.cache.layers
        return layers[layer].keys.shape[2] if len(layers) > layer and layers[layer].keys is not None else 0

    @property
    def lengths(self) -> list[int]:
        return [self.held(layer) for layer in range(LAYERS)]

    def _truncate(self, size: int) -> None:
        """Gather what the last cut left out of the cache of every layer before it."""
        for number in range(max(self.even.at)):
            past = self.held(number) - len(self.alive[number])
            stay = [index for index, place in enumerate(self.alive[number]) if place in self.alive[-1]]
            index = torch.tensor([*range(past), *(past + place for place in stay)])
            held = self.cache.layers[number]
            held.keys, held.values = held.keys[:, :, index], held.values[:, :, index]


def lengths(cache: Any) -> list[int]:
    """What the layers of a cache hold."""
    return [layer.keys.shape[2] for layer in cache.layers]


def by_hand(model: Any, even: Even, prompts: Batch, number: int, later: int = 0) -> tuple[Hand, Tensor, Tensor]:
    """One prompt of a batch fed to a `Hand`; also its logits, and positions `(..., T)` of `later` tokens after it."""
    row, padding = prompts.rows[number], prompts.padding(number)
    embeds = heard(model, prompts.inputs())["inputs_embeds"][number, padding:]
    inputs, size = prompts.alone(number), len(row.ids)
    positions = true_positions(model, extended(inputs, torch.full((1, later), 11)))
    hand = Hand(model, even)
    spots = [shown.places for shown in row.shown]
    logits = hand.feed(embeds, spots, positions[..., :size], deep_features(model, prompts, number, 0))
    return hand, logits, positions[..., size:]


def forget(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs, for which Qwen must not use what its module remembers of other prompts."""
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None
    return inputs


def words(model: Any, tokens: Tensor) -> Tensor:
    return model.get_input_embeddings()(tokens)


def random_text(*shape: int, seed: int = 5) -> Tensor:
    return torch.randint(10, 100, shape, generator=torch.Generator().manual_seed(seed))


# What is left in each layer, and what comes of it

VARIANTS: dict[str, dict[str, Any]] = {
    "once": {"at": (2,)},
    "twice": {"at": (2, 3)},
    "twice, contiguous": {"at": (2, 3), "positions": "contiguous"},
    "once, truncated": {"at": (3,), "truncate": True},
    "twice, truncated": {"at": (2, 3), "truncate": True},
    "twice, contiguous, truncated": {"at": (2, 3), "positions": "contiguous", "truncate": True},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


@every_family
@every_variant
@torch.no_grad()
def test_prefill_and_decoding_are_those_of_the_layers_by_hand(family: Family, variant: dict[str, Any]) -> None:
    """Prompts alone and in a batch, one of them without an image; every layer holds what it should, no more."""
    model, even = family.model(), Even(**variant)
    coordinates = hasattr(model.model, "get_rope_index")
    if not family.deep:  # earlier, where the model allows it
        even = replace(even, at=tuple(layer - 1 for layer in even.at))
    numbering = "original" if coordinates else even.positions
    shapes = [ONE_IMAGE, TEXT, TWO_IMAGES, *([("text", "clip", "text", "image")] if family.frames else [])]
    prompts, steps = family.batch(shapes), 3
    more = random_text(len(shapes), steps)
    hands: list[tuple[Tensor, Tensor, list[Tensor], list[int]]] = []
    numbers: list[Tensor] = []
    for number in range(len(shapes)):
        hand, logits, positions = by_hand(model, replace(even, positions=numbering), prompts, number, steps)
        alone, alive = forget(model, prompts.alone(number)), torch.tensor(hand.alive[-1])
        with vtc.compress(model, even):
            out = model(**alone)
            assert near(out.logits[0, alive], logits)
            assert lengths(out.past_key_values) == hand.lengths
            assert out.past_key_values.get_seq_length() == len(prompts.rows[number].ids)
            said = []
            for step in range(steps):
                out = model(input_ids=more[number : number + 1, step : step + 1], past_key_values=out.past_key_values)
                said.append(hand.feed(words(model, more[number, step : step + 1]), (), positions[..., step : step + 1]))
                assert near(out.logits[0], said[-1])
            assert lengths(out.past_key_values) == hand.lengths
        hands.append((alive, logits, said, hand.lengths))
        numbers.append(positions)
    if even.truncate:
        assert len(set(hands[0][3])) == 1
    else:
        assert len(set(hands[0][3])) == len(even.at) + 1 and hands[0][3] == sorted(hands[0][3], reverse=True)

    inputs = forget(model, prompts.inputs())
    with vtc.compress(model, even):
        out = model(**inputs)
        longest = [max(held) - steps for held in zip(*(held for *_, held in hands), strict=True)]
        assert lengths(out.past_key_values) == longest
        for number, (alive, logits, *_) in enumerate(hands):
            assert near(out.logits[number, prompts.padding(number) + alive], logits)
        mask = inputs["attention_mask"]
        for step in range(steps):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            given = {"input_ids": more[:, step : step + 1], "attention_mask": mask}
            if coordinates:  # which Qwen's forward would make from the whole mask
                given["position_ids"] = torch.stack(numbers, dim=1)[..., step : step + 1]
            out = model(**given, past_key_values=out.past_key_values)
            for number, (_, _, said, _) in enumerate(hands):
                assert near(out.logits[number], said[step])
        assert lengths(out.past_key_values) == [length + steps for length in longest]


@every_attention
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llava", "llava-siglip", "qwen3vl"])
@torch.no_grad()
def test_attention_implementations_and_bfloat16(name: str, attention: str, dtype: torch.dtype) -> None:
    family, even = FAMILIES[name], Even(at=(2, 3), truncate=True)
    model, prompts = family.model(attention, dtype), family.batch([TWO_IMAGES], dtype=dtype)
    hand, logits, positions = by_hand(model, even, prompts, 0, 1)
    token = random_text(1, 1)
    with vtc.compress(model, even):
        out = model(**prompts.inputs())
        assert out.logits.dtype == dtype and near(out.logits[0, hand.alive[-1]], logits)
        said = model(input_ids=token, past_key_values=out.past_key_values).logits[0]
        assert near(said, hand.feed(words(model, token[0]), (), positions))


@pytest.mark.parametrize(
    ("spec", "counts"),
    [
        ("fastv:keep=5,layer=1", (16, 5, 5, 5)),
        ("fastv:keep=0.5,layer=2", (16, 16, 8, 8)),
        ("pyramiddrop:keep=0.125", (16, 8, 4, 2)),
        ("pyramiddrop:keep=4,stages=1", (16, 16, 4, 4)),
        ("holitom-inner:keep=3,layer=-1", (16, 16, 16, 3)),
        ("todre-inner", (16, 16, 16, 0)),
        ("fastv:keep=5,layer=1,truncate=True", (5, 5, 5, 5)),
        ("pyramiddrop:keep=0.125,truncate=True", (2, 2, 2, 2)),
        ("todre-inner:truncate=True", (0, 0, 0, 0)),
    ],
)
@torch.no_grad()
def test_what_each_layer_of_the_cache_holds(spec: str, counts: tuple[int, ...]) -> None:
    """Of two images in a prompt; in a batch, of the longest row, which is another one once the images are gone."""
    family = FAMILIES["llava"]
    model, prompts = family.model(), family.batch([TWO_IMAGES, ONE_IMAGE, TEXT])
    texts = [len(row.ids) - 16 * len(row.shown) for row in prompts.rows]
    steps = GREEDY["max_new_tokens"] - 1  # the last token is never fed
    with vtc.compress(model, spec) as run:
        cache = model.generate(**prompts.alone(0), **GREEDY).past_key_values
        assert lengths(cache) == [texts[0] + 2 * count + steps for count in counts]
        assert cache.get_seq_length() == texts[0] + 32 + steps
        cache = model.generate(**prompts.inputs(), **GREEDY).past_key_values
        longest = [
            max(text + images * count for text, images in zip(texts, (2, 1, 0), strict=True)) for count in counts
        ]
        assert lengths(cache) == [length + steps for length in longest]
        assert run.last is not None
        if "truncate" not in spec:
            assert list(run.last.lengths) == longest


@torch.no_grad()
def test_a_row_without_images_is_left_alone() -> None:
    """Beside rows that shrink, and when the only row that shrinks is not the longest."""
    family = FAMILIES["llava"]
    model, prompts = family.model(), family.batch([ONE_IMAGE, TEXT])
    rows = (prompts.rows[0], Row(random_text(40), ()))
    prompts = replace(prompts, rows=rows)
    expected = [model(**prompts.alone(1)).logits[0], *model.generate(**prompts.alone(1), **GREEDY).logits]
    for spec in [*INNER, "pyramiddrop:keep=3,stages=2,truncate=True"]:
        with vtc.compress(model, spec):
            assert near(model(**prompts.inputs()).logits[1], expected[0])
            out, alone = model.generate(**prompts.inputs(), **GREEDY), model.generate(**prompts.alone(0), **GREEDY)
        assert all(near(mine[1], theirs[0]) for mine, theirs in zip(out.logits, expected[1:], strict=True))
        assert all(near(mine[0], theirs[0]) for mine, theirs in zip(out.logits, alone.logits, strict=True))


@pytest.mark.parametrize("spec", [*INNER, "todre-inner:layer=1", "pyramiddrop:truncate=true", Even(at=(1, 2))], ids=str)
@torch.no_grad()
def test_prompts_that_begin_or_end_with_an_image(spec: Any) -> None:
    """Nothing may be left in front of the text, or of the last token."""
    family = FAMILIES["llava"]
    model = family.model()
    prompts = family.batch([("image", "text"), ("image", "image", "text"), TEXT, ("text", "image")])
    with vtc.compress(model, spec):
        together = model.generate(**prompts.inputs(), **GREEDY)
        for number in range(4):
            alone = model.generate(**prompts.alone(number), **GREEDY)
            assert near(torch.stack(together.logits)[:, number], torch.stack(alone.logits)[:, 0])


@pytest.mark.parametrize("variant", [{"at": (1, 2)}, {"at": (1, 2), "truncate": True}, VARIANTS["twice, contiguous"]])
@torch.no_grad()
def test_what_was_generated_can_be_taken_back(variant: dict[str, Any]) -> None:
    """`crop` counts tokens of the text, though every layer holds another number of them."""
    family = FAMILIES["llava"]
    model, inputs, more = family.model(), family.batch([ONE_IMAGE]).inputs(), random_text(1, 3)
    with vtc.compress(model, Even(**variant)):
        cache = model(**inputs).past_key_values
        held, size = lengths(cache), cache.get_seq_length()
        expected = model(input_ids=more, past_key_values=deepcopy(cache)).logits
        for count in (-5, size):
            model(input_ids=random_text(1, 5, seed=9), past_key_values=cache)
            cache.crop(count)
            assert lengths(cache) == held and cache.get_seq_length() == size
        assert near(model(input_ids=more, past_key_values=cache).logits, expected)
        with pytest.raises(vtc.VtcError, match="inside its visual tokens"):
            cache.crop(8)


@every_inner
@torch.no_grad()
def test_padding_on_the_right(spec: str) -> None:
    """The last token of a prompt is its last real one."""
    family = FAMILIES["llava"]
    model, prompts = family.model(), family.batch([TWO_IMAGES, ONE_IMAGE, TEXT])
    inputs = prompts.inputs()
    shifts = [-prompts.padding(number) for number in range(3)]
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.stack([line.roll(shift) for line, shift in zip(inputs[name], shifts, strict=True)])
    with vtc.compress(model, spec) as run:
        logits, kept = model(**inputs).logits, run.last.kept  # type: ignore[union-attr]
        for number, row in enumerate(prompts.rows):
            alone = model(**prompts.alone(number)).logits[0]
            assert near(logits[number, : len(row.ids)], alone)
        model(**prompts.inputs())
        assert run.last.kept == kept  # type: ignore[union-attr]


# More calls on one cache


def parts_of(prompts: Batch, borders: Sequence[int]) -> list[dict[str, Tensor]]:
    """One prompt in pieces that end before each border."""
    row = prompts.rows[0]
    pieces = []
    for start, stop in zip([0, *borders], [*borders, len(row.ids)], strict=True):
        shown = tuple(item for item in row.shown if start <= item.places[0] < stop)
        pieces.append(replace(prompts, rows=(Row(row.ids[start:stop], shown),)).inputs())
        pieces[-1].pop("attention_mask")
    return pieces


@plain_families
@pytest.mark.parametrize("variant", [v for v in VARIANTS.values() if not v.get("truncate")], ids=str)
@torch.no_grad()
def test_pieces_of_a_prompt_on_one_cache_are_the_prompt_at_once(name: str, variant: dict[str, Any]) -> None:
    """Text, an image, text, another image: cut anywhere around them, and with nothing but an image in a call."""
    family, even = FAMILIES[name], Even(**variant)
    model = family.model()
    prompts = family.batch([("text", "image", "text", "image", "text")])
    first, second = prompts.rows[0].shown
    end, size = first.places[-1] + 1, len(prompts.rows[0].ids)
    with vtc.compress(model, even) as run:
        whole = model(**prompts.inputs())
        kept = run.last.kept  # type: ignore[union-attr]
        for borders in (
            [end + 1],
            [first.places[0], second.places[0]],
            [first.places[0], end, end + 2, second.places[0], second.places[-1] + 1, size - 1],
        ):
            cache: Any = None
            logits, seen = [], []
            for piece in parts_of(prompts, borders):
                out = model(**piece, past_key_values=cache)
                cache = out.past_key_values
                logits.append(out.logits)
                if "pixel_values" in piece:
                    seen.append(run.last.kept)  # type: ignore[union-attr]
            assert lengths(cache) == lengths(whole.past_key_values)
            assert cache.get_seq_length() == size
            alive = sorted({*range(size)} - {p for s in (first, second) for p in s.places})
            alive += [s.places[i] for s, one in zip((first, second), kept, strict=True) for i in one]
            assert near(torch.cat(logits, dim=1)[0, alive], whole.logits[0, alive])
            assert seen == [(one,) for one in kept]


@plain_families
@every_variant
@torch.no_grad()
def test_a_second_turn_with_an_image_is_the_layers_by_hand(name: str, variant: dict[str, Any]) -> None:
    """With truncation too, where the second turn sees less of the first than a single call would."""
    family, even = FAMILIES[name], Even(**variant)
    model = family.model()
    prompts = family.batch([("text", "image", "text", "image", "text")])
    row = prompts.rows[0]
    start = row.shown[1].places[0] - 2
    first, second = parts_of(prompts, [start])
    embeds = heard(model, prompts.inputs())["inputs_embeds"][0]
    hand = Hand(model, even)
    spots = [row.shown[0].places, [place - start for place in row.shown[1].places]]
    more = random_text(1, 4)
    with vtc.compress(model, even):
        out = model(**first)
        assert near(out.logits[0, -1], hand.feed(embeds[:start], spots[:1])[-1])
        out = model(**second, past_key_values=out.past_key_values)
        assert near(out.logits[0, -1], hand.feed(embeds[start:], spots[1:])[-1])
        assert lengths(out.past_key_values) == hand.lengths
        out = model(input_ids=more, past_key_values=out.past_key_values)  # several tokens of text at once
        assert near(out.logits[0], hand.feed(words(model, more[0])))
        out = model(input_ids=more[:, :1], past_key_values=out.past_key_values)
        assert near(out.logits[0], hand.feed(words(model, more[0, :1])))
        assert lengths(out.past_key_values) == hand.lengths


@every_variant
@torch.no_grad()
def test_second_turns_in_a_batch(variant: dict[str, Any]) -> None:
    """One row sees an image in the first turn, the other in the second; there is padding between the turns."""
    family, even = FAMILIES["llava"], Even(**variant)
    model = family.model()
    turns = [family.batch([ONE_IMAGE, TEXT]), family.batch([TEXT, TWO_IMAGES], seed=1)]
    given = [turn.inputs() for turn in turns]
    mask = torch.cat([turn["attention_mask"] for turn in given], dim=1)
    numbers = (mask.cumsum(1) - 1).clamp(min=0)
    split = given[0]["input_ids"].shape[1]
    more = random_text(2, 3)
    with vtc.compress(model, even):
        out = model(**given[0], position_ids=numbers[:, :split])
        second = {**given[1], "attention_mask": mask, "position_ids": numbers[:, split:]}
        cache = out.past_key_values
        out = model(**second, past_key_values=cache)
        mask = torch.cat([mask, torch.ones_like(more)], dim=1)
        last = model(
            input_ids=more, attention_mask=mask, position_ids=(mask.cumsum(1) - 1)[:, -3:], past_key_values=cache
        )
    for number in range(2):
        hand = Hand(model, even)
        for turn, logits in zip(turns, (None, out.logits), strict=True):
            row, padding = turn.rows[number], turn.padding(number)
            embeds = heard(model, turn.inputs())["inputs_embeds"][number, padding:]
            said = hand.feed(embeds, [shown.places for shown in row.shown])
            if logits is not None:
                assert near(logits[number, padding + torch.tensor(hand.alive[-1])], said)
        assert near(last.logits[number], hand.feed(words(model, more[number])))


@plain_families
@pytest.mark.parametrize("spec", INNER)
@torch.no_grad()
def test_what_follows_a_prompt_is_the_same_in_any_pieces(name: str, spec: str) -> None:
    """Strategies that look at the end of the prompt choose once: text after it, in one piece or token by token."""
    family = FAMILIES[name]
    model, prompts, more = family.model(), family.batch([TWO_IMAGES]), random_text(1, 5)
    with vtc.compress(model, spec):
        first = model(**prompts.inputs()).past_key_values
        copies = [deepcopy(first) for _ in range(2)]
        at_once = model(input_ids=more, past_key_values=copies[0]).logits
        for step in range(5):
            one = model(input_ids=more[:, step : step + 1], past_key_values=copies[1]).logits
            assert near(one[:, 0], at_once[:, step])
        assert lengths(copies[0]) == lengths(copies[1]) == [length + 5 for length in lengths(first)]


@torch.no_grad()
def test_without_a_cache_nothing_else_changes() -> None:
    family = FAMILIES["llava"]
    model, prompts = family.model(), family.batch([TWO_IMAGES, TEXT, ONE_IMAGE])
    inputs = prompts.inputs()
    specs: list[Any] = [*INNER, "fastv:keep=3,layer=1,truncate=True", Even(at=(1, 3)), Even(at=(2,), truncate=True)]
    for spec in specs:
        with vtc.compress(model, spec):
            out, expected = model(**inputs, use_cache=False), model(**inputs)
            assert out.past_key_values is None and near(out.logits, expected.logits)
    with vtc.compress(model, Even(at=(1, 3))):  # whose choice is the same for every longer prompt
        cached, again = model.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY, use_cache=False)
    assert torch.equal(cached.sequences, again.sequences)
    assert near(torch.stack(cached.logits), torch.stack(again.logits))


@torch.no_grad()
def test_sessions_replaced_between_turns() -> None:
    """A cache with layers of several lengths goes on under compressors at the same layers, and under no others."""
    family = FAMILIES["llava"]
    model, inputs, more = family.make(), family.batch([ONE_IMAGE]).inputs(), random_text(1, 2)
    with vtc.compress(model, Even(at=(1, 2))):
        cache = model(**inputs).past_key_values
        expected = model(input_ids=more, past_key_values=deepcopy(cache)).logits
    for other in ("uniform:keep=4", "fastv:layer=2", "none", Even(at=(1, 3))):
        with vtc.compress(model, other), pytest.raises(vtc.VtcError, match="by other compressors than the present"):
            model(input_ids=more, past_key_values=deepcopy(cache))
    for same in (Even(at=(1, 2)), ["fastv:keep=3,layer=1", "todre-inner:layer=2"], "pyramiddrop"):
        with vtc.compress(model, same):
            assert torch.equal(model(input_ids=more, past_key_values=deepcopy(cache)).logits, expected)


# What cannot be


class Elsewhere(QuantizedLayer):
    """Keys and values where quantised ones are, without the loss."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor

    def _dequantize(self, tensor: Tensor) -> Tensor:
        return tensor


@pytest.mark.parametrize("spec", ["fastv:keep=5,layer=2", "todre-inner:layer=2,tau=0.9"])
@torch.no_grad()
def test_quantised_keys(spec: str) -> None:
    """The layer's own keys are computed anew; those of earlier calls cannot be."""
    family = FAMILIES["llava"]
    model, inputs = family.model(), family.batch([TWO_IMAGES, ONE_IMAGE]).inputs()
    word, cache = torch.tensor([[20], [21]]), Cache(layers=[Elsewhere() for _ in range(LAYERS)])
    with vtc.compress(model, spec) as run:
        expected = [model(**inputs).logits]
        first = run.last.kept  # type: ignore[union-attr]
        found = [model(**inputs, past_key_values=cache).logits]
        assert run.last.kept == first  # type: ignore[union-attr]
        plain = model(**inputs).past_key_values
        for held, logits in ((plain, expected), (cache, found)):
            logits.append(model(input_ids=word, past_key_values=held).logits)
        assert all(near(*pair) for pair in zip(found, expected, strict=True))
        with pytest.raises(vtc.VtcError, match="quantised keys"):
            model(**{**inputs, "attention_mask": None}, past_key_values=cache)


@torch.no_grad()
def test_truncation_needs_a_cache_that_can_be_cut() -> None:
    family = FAMILIES["llava"]
    model, inputs = family.make(), family.batch([ONE_IMAGE]).inputs()
    expected = model(**inputs).logits
    with vtc.compress(model, "fastv:keep=4,layer=2,truncate=true"):
        static = StaticCache(model.config.text_config, max_cache_len=64)
        with pytest.raises(vtc.VtcError, match=r"truncate=true .* use a DynamicCache, or leave truncate out"):
            model(**inputs, past_key_values=static)
        assert static.get_seq_length() == 0
        with pytest.raises(vtc.VtcError, match="leave truncate out"):
            model.generate(**inputs, **GREEDY, cache_implementation="static")
        assert set(lengths(model(**inputs).past_key_values)) == {inputs["input_ids"].shape[1] - 12}
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["fastv:layer=2", "holitom-inner:layer=2"], "fastv:keep=0.5 and holitom-inner:.* both .* decoder layer 2"),
        (["fastv:layer=1", "fastv:layer=-3"], "both act in front of decoder layer 1"),
        ("pyramiddrop+todre-inner:layer=0.75", "both act in front of decoder layer 3"),
        ([Even(at=(1, 2)), Even(at=(2, 3))], "both act in front of decoder layer 2"),
    ],
)
def test_two_compressors_in_front_of_one_layer(spec: Any, message: str) -> None:
    refused("llava", spec, vtc.SpecError, message)


@pytest.mark.parametrize("layer", [0, 4, -4, 100])
def test_layers_that_do_not_exist(layer: int) -> None:
    message = rf"fastv: layer={layer} .* 4 layers; use 1 to 3, -3 to -1, or a fraction"
    refused("llava", f"fastv:layer={layer}", vtc.UnsupportedModelError, message)


def test_layers_that_still_get_visual_features() -> None:
    message = "acts in front of decoder layer 1, but .* up to layer 1: layer=2 is the first that works"
    for spec in ("fastv:layer=1", "pyramiddrop", Even(at=(1,))):
        refused("qwen3vl", spec, vtc.SpecError, message)


def refused(name: str, spec: Any, kind: type[Exception], message: str) -> None:
    model = FAMILIES[name].model()
    with pytest.raises(kind, match=message) as caught:
        vtc.compress(model, spec)
    assert "\n" not in str(caught.value)
    assert not any(module._forward_pre_hooks for module in model.model.language_model.modules())


def sliding_qwen2() -> Any:
    return transformers.Qwen2Config(**WIDTH, use_sliding_window=True, sliding_window=8, max_window_layers=2)


def sliding_mistral() -> Any:
    return transformers.MistralConfig(**WIDTH, sliding_window=8)


@pytest.mark.parametrize("text", [sliding_qwen2, sliding_mistral])
def test_sliding_windows_are_refused(text: Any) -> None:
    model = llava(text=text)
    with pytest.raises(vtc.UnsupportedModelError, match="fastv.*sliding windows"):
        vtc.compress(model, ["uniform", "fastv"])
    assert not any(module._forward_pre_hooks for module in model.modules())


def norms_over_all_heads() -> Any:
    return transformers.OlmoeConfig(**WIDTH)


def norms_of_other_names() -> Any:
    return transformers.PhiConfig(**WIDTH, qk_layernorm=True)


def norms_behind_the_attention() -> Any:
    return transformers.Olmo2Config(**WIDTH)


@pytest.mark.parametrize("text", [norms_over_all_heads, norms_of_other_names, norms_behind_the_attention])
def test_attention_that_cannot_be_read_is_refused(text: Any) -> None:
    model = llava(text=text)
    with pytest.raises(vtc.UnsupportedModelError, match=r"cannot be read.*before the language model"):
        vtc.compress(model, "fastv")
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("text", [qwen2, llama, lambda: transformers.MistralConfig(**WIDTH, sliding_window=None)])
@torch.no_grad()
def test_language_models_without_sliding_windows_are_not(text: Any) -> None:
    model = Family("llava", partial(llava, text=text)).make()
    with vtc.compress(model, "fastv:keep=4") as run:
        model(**FAMILIES["llava"].batch([ONE_IMAGE]).inputs())
    assert run.last is not None and run.last.tokens_out == 4


# What callers ask for


@every_family
@torch.no_grad()
def test_hidden_states_are_those_of_the_layers_by_hand(family: Family) -> None:
    """Each has the full length; where a token is gone there is a copy of the survivor before it."""
    model, even, prompts = family.model(), Even(at=(2, 3)), family.batch([TWO_IMAGES, TEXT, ONE_IMAGE])
    with vtc.compress(model, even):
        out = model(**prompts.inputs(), output_hidden_states=True)
    assert [state.shape for state in out.hidden_states] == [out.hidden_states[0].shape] * (LAYERS + 1)
    text = model.model.language_model
    assert torch.equal(out.hidden_states[0], heard(model, prompts.inputs())["inputs_embeds"])
    for number, row in enumerate(prompts.rows):
        hand = by_hand(model, even, prompts, number)[0]
        states = [*hand.states[:-1], text.norm(hand.states[-1])]
        for entry, state, alive in zip(out.hidden_states[1:], states, hand.alive, strict=True):
            mine = entry[number, prompts.padding(number) :]
            assert near(mine[alive], state)
            before = [max(place for place in alive if place <= position) for position in range(len(row.ids))]
            assert torch.equal(mine, mine[before])


OPTIONED: dict[str, Any] = {
    "one": Even(at=(1, 3)),
    "two": ["uniform:keep=9", Even(at=(1, 3))],
    "truncated": "pyramiddrop:truncate=true",
}


@pytest.mark.parametrize("spec", OPTIONED.values(), ids=OPTIONED)
@torch.no_grad()
def test_shapes_and_options_of_a_call(spec: Any) -> None:
    family = FAMILIES["llava"]
    model, prompts = family.model(), family.batch([TWO_IMAGES, TEXT])
    inputs = prompts.inputs()
    plain = model(**inputs, output_hidden_states=True)
    with vtc.compress(model, spec):
        out = model(**inputs, output_hidden_states=True)
        assert out.keys() == plain.keys() and out.logits.shape == plain.logits.shape
        assert [state.shape for state in out.hidden_states] == [state.shape for state in plain.hidden_states]
        assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
        assert near(model(**inputs, logits_to_keep=1).logits, out.logits[:, -1:])
        some = torch.tensor([0, 7, -1])
        assert near(model(**inputs, logits_to_keep=some).logits, out.logits[:, some])
        logits, cache, *_ = model(**inputs, return_dict=False)
        assert torch.equal(logits, out.logits) and lengths(cache) == lengths(out.past_key_values)
        token = random_text(2, 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], dim=1)
        said = [
            model(input_ids=token, attention_mask=mask, past_key_values=held).logits
            for held in (cache, out.past_key_values)
        ]
        assert torch.equal(*said)
        with pytest.raises(vtc.VtcError, match="output_attentions"):
            model(**inputs, output_attentions=True)


@every_family
@torch.no_grad()
def test_nothing_is_left_behind(family: Family) -> None:
    """Neither a shadowed method nor any other attribute, on any module, however often."""
    model, inputs = family.make(), family.batch(family.shapes["ragged"]).inputs()
    expected = model(**inputs).logits
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    specs: tuple[Any, ...] = ("fastv:keep=3", ["uniform:keep=6", Even(at=(2, 3))])
    for spec in specs:
        with vtc.compress(model, spec):
            model(**inputs)
        vtc.compress(model, spec)
        vtc.compress(model, spec)
        model(**inputs)
        vtc.restore(model)
        assert {name: set(vars(module)) for name, module in model.named_modules()} == before
        assert not {"get_image_features", "get_video_features"} & set(vars(model.model))
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("spec", [Even(at=(1, 3)), Even(at=(1, 3), truncate=True), "pyramiddrop:stages=2"], ids=str)
@torch.no_grad()
def test_an_error_in_a_layer_spoils_no_later_call(spec: Any) -> None:
    """Neither in the prefill nor while decoding, nor if the strategy itself fails; nor after restore."""
    family = FAMILIES["llava"]
    model, inputs, token = family.make(), family.batch([TWO_IMAGES, TEXT]).inputs(), random_text(2, 1)
    plain = model(**inputs).logits
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], dim=1)

    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    with vtc.compress(model, spec):
        expected, cache = model(**inputs).logits, model(**inputs).past_key_values
        said = model(input_ids=token, attention_mask=mask, past_key_values=deepcopy(cache)).logits
        for layer in model.model.language_model.layers:
            for register in (layer.register_forward_pre_hook, layer.mlp.register_forward_hook):
                handle = register(fail)
                with pytest.raises(ZeroDivisionError):
                    model(**inputs)
                with pytest.raises(ZeroDivisionError):
                    model(input_ids=token, attention_mask=mask, past_key_values=deepcopy(cache))
                handle.remove()
                assert torch.equal(model(**inputs).logits, expected)
                again = model(input_ids=token, attention_mask=mask, past_key_values=deepcopy(cache))
                assert torch.equal(again.logits, said)
    assert torch.equal(model(**inputs).logits, plain)


@dataclass(kw_only=True)
class Failing(Even):
    """Fails at its second cut."""

    name: ClassVar[str] = "failing"

    wrong: list[Any] = field(default_factory=list)

    def select(self, visual: Visual) -> Selection:
        if self.wrong and visual.layout.tokens < 16:
            return self.wrong[0](visual)
        return super().select(visual)


def one_too_few(visual: Visual) -> Selection:
    return Selection(torch.arange(visual.budget - 1).expand(visual.inputs, -1), visual.layout.tokens)


def undeclared(visual: Visual) -> Selection:
    return visual.attention  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (one_too_few, vtc.VtcError, r"failing must keep 4 of 8 tokens of 2 visual inputs, .* \(2, 3\) into 8"),
        (undeclared, AttributeError, "attention was not declared: add it to the strategy's `needs`"),
    ],
)
@torch.no_grad()
def test_a_strategy_that_fails_inside(wrong: Any, kind: type[Exception], message: str) -> None:
    family, strategy = FAMILIES["llava"], Failing(at=(1, 3))
    model, inputs = family.make(), family.batch([TWO_IMAGES]).inputs()
    plain = model(**inputs).logits
    with vtc.compress(model, strategy):
        expected = model(**inputs).logits
        strategy.wrong.append(wrong)
        with pytest.raises(kind, match=message):
            model(**inputs)
        strategy.wrong.clear()
        assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model(**inputs).logits, plain)


# Attention between text and visual tokens


@dataclass(kw_only=True)
class Exchange(LayerCompressor):
    """Keeps everything and remembers what it was told."""

    name: ClassVar[str] = "exchange"

    keep: int | float = 1.0
    told: list[Tensor] = field(default_factory=list)
    wanted: str = "exchange"

    def _check_types(self) -> None: ...

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.wanted})

    @property
    def adaptive(self) -> bool:
        return True

    def select(self, visual: Visual) -> Selection:
        self.told.append(visual.exchange if self.wanted == "exchange" else visual.attention)
        return Selection.keep(torch.arange(visual.layout.tokens).expand(visual.inputs, -1), visual.layout.tokens)


def attention_map(layer: Any, hidden: Tensor, rotation: Sequence[Tensor]) -> Tensor:
    """`(S, S)` float64: causal attention of one layer on `(S, D)`, averaged over heads."""
    exact = deepcopy(layer).double()
    x, (cos, sin) = exact.input_layernorm(hidden.double()), (part.double() for part in rotation)
    heads = []
    for kind in "qk":
        part = getattr(exact.self_attn, f"{kind}_proj")(x).unflatten(-1, (-1, exact.self_attn.head_dim))
        norm = getattr(exact.self_attn, f"{kind}_norm", None)
        part = part if norm is None else norm(part)  # (S, heads, head_dim)
        half = part.shape[-1] // 2
        turned = torch.cat([-part[..., half:], part[..., :half]], dim=-1)
        heads.append(part * cos[:, None] + turned * sin[:, None])
    query, key = heads
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    score = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    future = torch.ones(len(hidden), len(hidden), dtype=torch.bool).triu(1)
    return score.masked_fill(future, -torch.inf).softmax(-1).mean(0)


@torch.no_grad()
def layer_inputs(model: Any, inputs: dict[str, Tensor], number: int) -> dict[str, Any]:
    """What an uncompressed model hands to a decoder layer."""
    given: dict[str, Any] = {}

    def note(module: Any, args: Any, kwargs: Any) -> None:
        given.update(kwargs, hidden=args[0] if args else kwargs["hidden_states"])

    handle = model.model.language_model.layers[number].register_forward_pre_hook(note, with_kwargs=True)
    model(**inputs)
    handle.remove()
    return given


def masses(share: Tensor, visual: list[int]) -> Tensor:
    """`(2,)`: mean mass from the text behind the first visual token to visual tokens, and back."""
    text = [place for place in range(visual[0], len(share)) if place not in visual]
    there = share[text][:, visual].sum(1).mean() if text else torch.zeros(())
    return torch.stack([there, share[visual][:, text].sum(1).mean()])


@every_family
@every_attention
@torch.no_grad()
def test_exchanged_attention_is_that_of_the_whole_map(family: Family, attention: str) -> None:
    """Per prompt, in a padded batch, both ways; and the row of the last token, in the layer just run and the next."""
    model, prompts = family.model(attention), family.batch([TWO_IMAGES, TEXT, ONE_IMAGE, ("text", "image")])
    compressors = {wanted: Exchange(layer=2, wanted=wanted) for wanted in ("exchange", "attention", "ahead")}
    for compressor in compressors.values():
        with vtc.compress(model, compressor):
            model(**prompts.inputs())
    shown = [(number, item) for number, item in prompts.visuals()]
    assert [len(compressor.told) for compressor in compressors.values()] == [len(shown)] * 3
    for wanted, compressor in compressors.items():
        number_of_layer = 2 if wanted == "ahead" else 1
        layer = model.model.language_model.layers[number_of_layer]
        for (number, item), told in zip(shown, compressor.told, strict=True):
            given = layer_inputs(model, prompts.alone(number), number_of_layer)
            share = attention_map(layer, given["hidden"][0], [part[0] for part in given["position_embeddings"]])
            places = [place for image in prompts.rows[number].shown for place in image.places]
            expected = masses(share, places) if wanted == "exchange" else share[-1, list(item.places)]
            assert (told[0] - expected).abs().max() < 1e-6
            if (
                wanted == "exchange"
                and len(prompts.rows[number].shown) == 1
                and not any(places[0] < place < places[-1] for place in range(len(share)) if place not in places)
            ):
                assert told[0, 1] == 0  # nothing of the text behind it is seen by the only image


@pytest.mark.parametrize("text", [transformers.PhiConfig, transformers.StableLmConfig, transformers.CohereConfig])
@torch.no_grad()
def test_attention_of_models_that_rotate_otherwise(text: Any) -> None:
    """Only the first channels of a head, or neighbouring ones: the row is that of the model's own map."""
    model = Family("llava", partial(llava, text=partial(text, **WIDTH))).make("eager")
    inputs, maps = FAMILIES["llava"].batch([ONE_IMAGE]).inputs(), []
    compressor = Exchange(layer=2, wanted="attention")
    attention = model.model.language_model.layers[1].self_attn
    handle = attention.register_forward_hook(lambda module, args, output: maps.append(output[1]))
    with vtc.compress(model, compressor):
        model(**inputs)
    handle.remove()
    expected = maps[0].mean(1)[:, -1, inputs["input_ids"][0] == IMAGE]
    assert near(compressor.told[0], expected)


@pytest.mark.parametrize("block", [1, 7, 256])
@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("name", ["llava", "llava-siglip"])
@torch.no_grad()
def test_attention_behind_a_cut_and_in_a_second_turn(
    name: str, positions: Any, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is left counts, at its true place. The first turn takes its share, and is neither text nor visual.

    The map is made in blocks of rows, whose size must not matter.
    """
    monkeypatch.setattr(decoder, "BLOCK", block)
    family, even = FAMILIES[name], Even(at=(1,), positions=positions)
    model, layer = family.model(), 2
    prompts = family.batch([("text", "image", "text", "image", "text", "image", "text")])
    row = prompts.rows[0]
    start = row.shown[1].places[0] - 2
    embeds = heard(model, prompts.inputs())["inputs_embeds"][0]
    hand = Hand(model, even)
    hand.feed(embeds[:start], [row.shown[0].places])
    states, places = [hand.states[layer - 1]], list(hand.alive[layer])
    hand.feed(embeds[start:], [[place - start for place in shown.places] for shown in row.shown[1:]])
    past = len(places)
    states, places = [*states, hand.states[layer - 1]], [*places, *(start + place for place in hand.alive[layer])]
    true = torch.arange(len(places)) if positions == "contiguous" else torch.tensor(places)
    hidden = torch.cat(states)
    rotation = model.model.language_model.rotary_emb(hidden[None], position_ids=true[None])
    share = attention_map(model.model.language_model.layers[layer], hidden, [part[0] for part in rotation])
    left = [[places.index(place) for place in shown.places[::2]] for shown in row.shown[1:]]
    for wanted, at in (("exchange", layer + 1), ("attention", layer + 1), ("ahead", layer)):
        told = Exchange(layer=at, wanted=wanted)
        with vtc.compress(model, [even, told]):
            first, second = parts_of(prompts, [start])
            cache = model(**first).past_key_values
            told.told.clear()
            model(**second, past_key_values=cache)
        flat = [place - past for spot in left for place in spot]
        both = masses(share[past:, past:], flat)
        assert both[1] > 0  # the second image sees the text between the two
        for number, one in enumerate(told.told):
            expected = both if wanted == "exchange" else share[-1, left[number]]
            assert (one[0] - expected).abs().max() < 1e-6
        assert len(told.told) == 2


@pytest.mark.parametrize("position", [0, 1])
@torch.no_grad()
def test_todre_inner_decides_per_prompt(position: int) -> None:
    """Tau between two prompts: the tokens of one go and those of the other stay; both masses have to be small."""
    family = FAMILIES["llava"]
    rows = [("text", "image", "text", "image", "text"), ONE_IMAGE, ("text", "image", "text", "image", "text"), TEXT]
    model, prompts, layer = family.model(), family.batch(rows), 3
    found: list[Tensor] = []
    for number in (0, 1, 2):
        given = layer_inputs(model, prompts.alone(number), layer - 1)
        module = model.model.language_model.layers[layer - 1]
        share = attention_map(module, given["hidden"][0], [part[0] for part in given["position_embeddings"]])
        found.append(masses(share, [place for item in prompts.rows[number].shown for place in item.places]))
    largest = sorted(float(pair.max()) for pair in found)
    tau = (largest[position] + largest[position + 1]) / 2
    assert largest[position] < largest[position + 1] < 1
    with vtc.compress(model, f"todre-inner:layer={layer},tau={tau}") as run:
        out = model(**prompts.inputs())
        counts = [len(kept) for kept in run.last.kept]  # type: ignore[union-attr]
        expected = [0 if float(found[number].max()) < tau else 16 for number, _ in prompts.visuals()]
        assert counts == expected and set(counts) == {0, 16}
        for number in range(4):
            alone = model(**prompts.alone(number)).logits[0, -1]
            assert near(out.logits[number, -1], alone)


def test_the_tests_own_strategy_is_what_it_says() -> None:
    layout = Layout.frames(1, 1, 7)
    assert Even(at=(1, 3)).budgets(layout) == (4, 2) and Even(at=(1, 3)).budget(layout) == 2
    assert Even().select(Visual(layout, 2, torch.device("cpu"), {}, 4)).index.tolist() == [[0, 2, 4, 6]] * 2
