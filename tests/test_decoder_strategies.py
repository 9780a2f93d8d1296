"""Strategies inside the language model against plain references, written from the formulas without the library."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import DECODER_SPECS
from vtc.compressor import NEEDS, DecoderCompressor, parse, strategy
from vtc.errors import SpecError, UnsupportedModelError
from vtc.selection import Selection
from vtc.visual import Layout, Visual
from watch import Watch

NAMES = ("fastv", "holitom-inner", "pyramiddrop", "todre-inner")
SIZES = [1, 2, 3, 8, 17, 30]
WIDTH = 16
ALL = [
    "fastv", "pyramiddrop", "pyramiddrop:stages=1", "holitom-inner", "holitom-inner:merge=mean",
    "holitom-inner:merge=drop", "todre-inner",
]  # fmt: skip
CHOOSING = [spec for spec in ALL if spec != "todre-inner"]
# The hidden states of signs have lengths, cosines and sums that are exact in float32, so that ties and copies are too.
KINDS = ["gaussian", "bfloat16", "signs", "few signs"]


def layout(tokens: int) -> Layout:
    return Layout.frames(1, 1, tokens)


def drive(spec: str, **options: Any) -> DecoderCompressor:
    made = parse(spec)
    assert isinstance(made, DecoderCompressor)
    return type(made)(**{item.name: getattr(made, item.name) for item in fields(made)} | options)


def hidden(kind: str, tokens: int, batch: int = 3) -> Tensor:
    """`(B, N, D)` hidden states."""
    draw = torch.Generator().manual_seed(tokens)
    if "signs" not in kind:
        x = torch.randn(batch, tokens, WIDTH, generator=draw)
        return x.bfloat16() if kind == "bfloat16" else x
    x = torch.randint(0, 2, (batch, 3 if kind == "few signs" else tokens, WIDTH), generator=draw) * 2.0 - 1.0
    return x.gather(1, torch.randint(0, x.shape[1], (batch, tokens, 1), generator=draw).expand(-1, -1, WIDTH))


def attention(tokens: int, levels: int = 0, batch: int = 3) -> Tensor:
    """`(B, N)`: a part of a row of attention; `levels` makes ties."""
    draw = torch.Generator().manual_seed(tokens + 1)
    if levels:
        return torch.randint(0, levels, (batch, tokens), generator=draw) / 64
    return torch.randn(batch, tokens + 4, generator=draw).softmax(-1)[:, 2:-2]


def view(budget: int, tokens: int, **tensors: Tensor) -> Visual:
    first = next(iter(tensors.values()))
    loaders = {name: (lambda x=x: x) for name, x in tensors.items()}
    return Visual(layout(tokens), first.shape[0], first.device, loaders, budget)  # type: ignore[arg-type]


def both(tokens: int, budget: int, kind: str = "gaussian", batch: int = 3, device: str = "cpu") -> Visual:
    return view(
        budget,
        tokens,
        attention=attention(tokens, batch=batch).to(device),
        features=hidden(kind, tokens, batch).to(device),
    )


def best(score: list[float], k: int) -> list[int]:
    return sorted(sorted(range(len(score)), key=lambda i: (-score[i], i))[:k])


def nearest(rows: Tensor, kept: list[int]) -> dict[int, int]:
    """For each dropped token the kept one with the largest cosine, the first among equals."""
    x = rows.double()
    x = x / x.square().sum(-1, keepdim=True).sqrt()
    near = {}
    for token in range(len(x)):
        if token not in kept:
            cosines = [round(float((x[token] * x[centre]).sum()), 12) for centre in kept]
            near[token] = kept[cosines.index(max(cosines))]
    return near


# FastV and PyramidDrop: the best of one row


@pytest.mark.parametrize("levels", [0, 1, 4])
@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("spec", ["fastv", "pyramiddrop", "holitom-inner:merge=drop"])
def test_the_best_of_the_row_survive(spec: str, tokens: int, levels: int) -> None:
    """Exactly as many as the cut's budget says, whatever `keep` is: the layout is that of the tokens that are left."""
    score = attention(tokens, levels)
    for budget in range(1, tokens + 1):
        selection = parse(spec).select(view(budget, tokens, attention=score))
        assert selection.index.tolist() == [best(row, budget) for row in score.tolist()]
        assert selection.size == tokens and not selection.merges


def test_which_attention_is_read() -> None:
    assert parse("fastv").needs == {"attention"}
    assert parse("pyramiddrop").needs == {"ahead"}
    assert parse("holitom-inner").needs == parse("holitom-inner:merge=mean").needs == {"attention", "features"}
    assert parse("holitom-inner:merge=drop").needs == {"attention"}
    assert parse("todre-inner").needs == frozenset()
    assert parse("todre-inner:tau=0.1").needs == {"exchange"}
    for spec in [*ALL, *DECODER_SPECS.values()]:
        assert parse(spec).needs <= NEEDS["decoder"] and parse(spec).site == "decoder"


# The inner stage of HoliTom


def halved(rows: Tensor, kept: list[int]) -> Tensor:
    """`(K, D)` float64: each dropped token, in index order, averaged with what its centre has become."""
    state = {centre: rows[centre].double() for centre in kept}
    near = nearest(rows, kept)
    for token in sorted(near):
        state[near[token]] = (state[near[token]] + rows[token].double()) / 2
    return torch.stack([state[centre] for centre in kept])


def averaged(rows: Tensor, kept: list[int]) -> Tensor:
    """`(K, D)` float64: the mean of each centre and its members."""
    near = nearest(rows, kept)
    groups = [[centre] + [token for token, to in near.items() if to == centre] for centre in kept]
    return torch.stack([rows[group].double().mean(0) for group in groups])


@pytest.mark.parametrize(("merge", "reference"), [("halving", halved), ("mean", averaged)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", SIZES)
def test_holitom_inner(tokens: int, kind: str, merge: str, reference: Any) -> None:
    rows, score = hidden(kind, tokens), attention(tokens)
    for budget in {1, 2, tokens // 3, tokens // 2, tokens - 1, tokens} - {0}:
        if budget > tokens:
            continue
        selection = parse(f"holitom-inner:merge={merge}").select(view(budget, tokens, attention=score, features=rows))
        merged = selection.apply(rows.float())
        for b in range(rows.shape[0]):
            kept = best(score[b].tolist(), budget)
            assert selection.index[b].tolist() == kept
            assert torch.allclose(merged[b].double(), reference(rows[b], kept), rtol=0, atol=1e-6)
        assert torch.allclose(selection.matrix().sum(2), torch.ones(rows.shape[0], budget), rtol=0, atol=1e-6)


def two_groups() -> Selection:
    """Tokens 1 and 4 survive; 0, 2, 5 are like 1, of which 0 stands before it, and 3 is like 4."""
    axis = torch.tensor([0, 0, 0, 1, 1, 0])
    features = torch.nn.functional.one_hot(axis, 2).float()[None]
    score = torch.tensor([[0.0, 0.5, 0.1, 0.2, 0.4, 0.3]])
    return parse("holitom-inner:keep=2").select(view(2, 6, attention=score, features=features))


def test_the_later_member_weighs_more() -> None:
    """The loop `h = (h + member) / 2` halves all that came before: order of index, not of attention."""
    assert two_groups().index.tolist() == [[1, 4]]
    assert two_groups().matrix().tolist() == [[[1 / 8, 1 / 8, 1 / 4, 0, 0, 1 / 2], [0, 0, 0, 1 / 2, 1 / 2, 0]]]


def test_one_entry_per_token_and_exact_powers_of_two() -> None:
    """A size that depends on sizes alone; a long chain of halves is exact until it is nothing."""
    tokens = 200
    score = torch.arange(tokens, 0, -1.0)[None]
    selection = parse("holitom-inner").select(view(1, tokens, attention=score, features=torch.ones(1, tokens, 4)))
    assert selection.slot is not None and selection.slot.shape == (1, tokens)
    chain = [2.0 ** -(tokens - 1)] + [2.0 ** -(tokens - place) for place in range(1, tokens)]
    rounded = torch.tensor(chain, dtype=torch.float64).float()
    normal = rounded >= torch.finfo(torch.float32).tiny
    weights = selection.matrix()[0, 0]
    assert torch.equal(weights[normal], rounded[normal])
    assert (weights[~normal] <= torch.finfo(torch.float32).tiny).all() and weights.isfinite().all()


def test_similarity_is_that_of_the_tokens_that_arrived() -> None:
    """A centre draws by what it was, not by what merging has made of it."""
    features = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.59, 0.81], [0.0, 1.0]]])
    score = torch.tensor([[0.9, 0.1, 0.1, 0.8]])
    # Token 1 is nearer to 3 (0.8) than to 0 (0.6), and so is 2 (0.81), however far 3 is drawn towards 1.
    selection = parse("holitom-inner").select(view(2, 4, attention=score, features=features))
    assert selection.sources().tolist() == [[0, 1, 1, 1]]
    assert selection.matrix().tolist() == [[[1, 0, 0, 0], [0, 0.25, 0.5, 0.25]]]


def test_a_token_without_direction_is_merged_without_harm() -> None:
    features = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]])
    score = torch.tensor([[0.9, 0.1, 0.8]])
    selection = parse("holitom-inner").select(view(2, 3, attention=score, features=features))
    assert selection.apply(features).tolist() == [[[0.5, 0.0], [0.0, 1.0]]]  # to the first of two equals


# The inner stage of ToDRE


@pytest.mark.parametrize("batch", [1, 3])
def test_todre_inner_drops_everything(batch: int) -> None:
    compressor = parse("todre-inner")
    selection = compressor.select(Visual(layout(9), batch, torch.device("cpu"), {}, compressor.budget(layout(9))))
    assert selection.index.shape == (batch, 0) and selection.size == 9 and not selection.merges
    assert not compressor.adaptive


@pytest.mark.parametrize(
    ("text_to_visual", "visual_to_text", "kept"),
    [(0.09, 0.0, 0), (0.0, 0.09, 0), (0.11, 0.0, 9), (0.0, 0.11, 9), (0.2, 0.2, 9), (0.125, 0.0, 9), (0.0, 0.125, 9)],
)
def test_todre_inner_drops_where_both_masses_are_small(text_to_visual: float, visual_to_text: float, kept: int) -> None:
    """Smaller than tau, not equal: an eighth is exact in float32."""
    compressor = parse(f"todre-inner:tau={0.125 if 0.125 in (text_to_visual, visual_to_text) else 0.1}")
    assert compressor.adaptive
    exchange = torch.tensor([[text_to_visual, visual_to_text]])
    selection = compressor.select(view(compressor.budget(layout(9)), 9, exchange=exchange))
    assert selection.index.tolist() == [list(range(kept))]


def test_todre_inner_can_be_told_to_keep_everything() -> None:
    for spec in ("todre-inner:keep=1.0", "todre-inner:keep=1.0,tau=0.1"):
        compressor = parse(spec)
        assert compressor.budget(layout(9)) == 9
        visual = view(9, 9, exchange=torch.zeros(1, 2))
        assert compressor.select(visual).index.tolist() == [list(range(9))]


@pytest.mark.parametrize("keep", [1, 2, 0.5, 0.0, -1, 64, math.nan])
def test_todre_inner_keeps_all_or_nothing(keep: float) -> None:
    with pytest.raises(SpecError, match=rf"todre-inner: keep={keep} is neither: it drops all .* \(0\) or none \(1.0\)"):
        strategy("todre-inner")(keep=keep)
    with pytest.raises(SpecError, match="keep='all' is not a whole number or a fraction"):
        strategy("todre-inner")(keep="all")


@pytest.mark.parametrize("tau", [0.0, -0.1, 1.5, math.nan, 10])
def test_todre_inner_tau_out_of_range(tau: float) -> None:
    with pytest.raises(SpecError, match=rf"todre-inner: tau={tau} is no attention mass"):
        strategy("todre-inner")(tau=tau)


# Where they cut, and what is left


@pytest.mark.parametrize(
    ("spec", "depth", "cuts"),
    [
        ("fastv", 32, (2,)),
        ("fastv:layer=3", 32, (3,)),
        ("fastv:layer=-1", 32, (31,)),
        ("fastv:layer=0.5", 32, (16,)),
        ("holitom-inner", 28, (18,)),
        ("holitom-inner:layer=60", 80, (60,)),
        ("todre-inner", 32, (28,)),
        ("todre-inner", 2, (1,)),
        ("todre-inner:layer=0.01", 4, (1,)),
        ("pyramiddrop", 32, (8, 16, 24)),
        ("pyramiddrop", 40, (10, 20, 30)),
        ("pyramiddrop", 28, (7, 14, 21)),
        ("pyramiddrop", 4, (1, 2, 3)),
        ("pyramiddrop:stages=1", 3, (1,)),
        ("pyramiddrop:stages=2", 3, (1, 2)),
    ],
)
def test_cuts(spec: str, depth: int, cuts: tuple[int, ...]) -> None:
    assert drive(spec).cuts(depth) == cuts


@pytest.mark.parametrize("name", ["fastv", "holitom-inner", "todre-inner"])
def test_there_must_be_a_layer_before_the_cut(name: str) -> None:
    for layer in (0, 32, -32, 100):
        with pytest.raises(
            UnsupportedModelError, match=rf"{name}: layer={layer} .* language model has 32 layers; use 1 to 31"
        ):
            drive(name, layer=layer).cuts(32)
    for layer in (0.0, 1.0, -0.5, 2.5, math.nan, math.inf):
        with pytest.raises(SpecError, match=rf"{name}: layer={layer} is not a fraction of depth"):
            drive(name, layer=layer)


def test_pyramiddrop_takes_stages_instead_of_a_layer() -> None:
    with pytest.raises(SpecError, match="pyramiddrop has no key 'layer'"):
        parse("pyramiddrop:layer=8")
    for stages in (0, -1):
        with pytest.raises(SpecError, match=f"stages={stages} never drops"):
            parse(f"pyramiddrop:stages={stages}")
    with pytest.raises(
        UnsupportedModelError, match="stages=3 needs a language model of at least 4 decoder layers.* has 3"
    ):
        drive("pyramiddrop").cuts(3)


@pytest.mark.parametrize("stages", range(1, 9))
def test_pyramiddrop_cuts_are_distinct_in_every_depth(stages: int) -> None:
    for depth in range(stages + 1, 60):
        cuts = drive("pyramiddrop", stages=stages).cuts(depth)
        assert len(cuts) == len(set(cuts)) == stages and list(cuts) == sorted(cuts)
        assert cuts[0] > 0 and cuts[-1] < depth


@pytest.mark.parametrize(
    ("spec", "tokens", "budgets"),
    [
        ("fastv", 576, (288,)),
        ("fastv:keep=0.25", 576, (144,)),
        ("fastv:keep=72", 576, (72,)),
        ("fastv", 577, (289,)),  # a half goes up
        ("holitom-inner", 937, (469,)),
        ("holitom-inner:keep=0.1", 3, (1,)),
        ("todre-inner", 576, (0,)),
        ("todre-inner:keep=1.0", 576, (576,)),
        ("pyramiddrop", 576, (288, 144, 72)),
        ("pyramiddrop", 2880, (1440, 720, 360)),
        ("pyramiddrop", 577, (288, 144, 72)),  # rounded down
        ("pyramiddrop:keep=72", 576, (288, 144, 72)),
        ("pyramiddrop:keep=0.343", 10, (7, 4, 3)),
        ("pyramiddrop:keep=0.729", 1000, (900, 810, 729)),
        ("pyramiddrop:keep=0.0625,stages=4", 64, (32, 16, 8, 4)),
        ("pyramiddrop:keep=0.25,stages=1", 64, (16,)),
        ("pyramiddrop", 1, (1, 1, 1)),
        ("pyramiddrop", 5, (2, 1, 1)),
        ("pyramiddrop:keep=9", 5, (5, 5, 5)),
        ("pyramiddrop:keep=1.0", 577, (577, 577, 577)),
    ],
)
def test_budgets(spec: str, tokens: int, budgets: tuple[int, ...]) -> None:
    assert drive(spec).budgets(layout(tokens)) == budgets


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_pyramiddrop_budgets_fall_and_end_at_keep(stages: int) -> None:
    for tokens in range(0, 70):
        for keep in (1, 7, 64, 0.001, 0.1, 0.125, 1 / 3, 0.99, 1.0):
            compressor = drive("pyramiddrop", stages=stages, keep=keep)
            budgets = compressor.budgets(layout(tokens))
            assert len(budgets) == stages and budgets[-1] == compressor.budget(layout(tokens))
            assert [tokens, *budgets] == sorted([tokens, *budgets], reverse=True)
            assert min(budgets) >= min(tokens, 1)
            if isinstance(keep, int):
                assert budgets[-1] == min(keep, tokens)


def test_positions_default_to_what_the_codes_do() -> None:
    defaults = {name: strategy(name)().positions for name in NAMES}
    assert defaults.pop("pyramiddrop") == "contiguous"
    assert set(defaults.values()) == {"original"}


# What holds for all of them


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", CHOOSING)
def test_exactly_the_budget_ascending_and_unique(spec: str, kind: str) -> None:
    for tokens in SIZES:
        for budget in range(1, tokens + 1):
            visual = both(tokens, budget, kind)
            selection = parse(spec).select(visual)
            assert selection.index.shape == (3, budget)
            assert (selection.index.diff(dim=1) > 0).all()
            assert selection.index.min() >= 0 and selection.index.max() < tokens
            merged = selection.apply(visual.features)
            assert merged.isfinite().all() and merged.dtype == visual.features.dtype


@pytest.mark.parametrize("spec", CHOOSING)
def test_keeping_all_changes_nothing(spec: str) -> None:
    visual = both(17, 17, "bfloat16")
    selection = parse(spec).select(visual)
    assert torch.equal(selection.apply(visual.features), visual.features)


@pytest.mark.parametrize("spec", CHOOSING)
def test_a_batch_is_its_rows_alone(spec: str) -> None:
    for budget in (1, 5, 12):
        visual = both(17, budget)
        together = parse(spec).select(visual)
        for row in range(3):
            part = {"attention": visual.attention[row : row + 1], "features": visual.features[row : row + 1]}
            alone = parse(spec).select(view(budget, 17, **part))
            assert torch.equal(together.index[row : row + 1], alone.index)
            assert torch.equal(together.matrix()[row : row + 1], alone.matrix())


@pytest.mark.parametrize("spec", CHOOSING)
def test_inputs_are_left_alone_and_answers_repeat(spec: str) -> None:
    compressor, visual = parse(spec), both(30, 9)
    features, score = visual.features.clone(), visual.attention.clone()
    first = compressor.select(visual)
    compressor.select(both(17, 5))
    again = compressor.select(visual)
    assert torch.equal(first.index, again.index) and torch.equal(first.matrix(), again.matrix())
    assert torch.equal(visual.features, features) and torch.equal(visual.attention, score)


@pytest.mark.parametrize("spec", ALL)
def test_only_declared_needs_are_read(spec: str) -> None:
    compressor = parse(spec)
    tensors = {"features": torch.randn(1, 25, 4), "attention": torch.rand(1, 25)}
    declared = {"features": {"features"}, "attention": {"attention", "ahead"}}
    loaders = {name: (lambda x=x: x) for name, x in tensors.items() if declared[name] & compressor.needs}
    budget = compressor.budget(layout(25))
    compressor.select(Visual(layout(25), 1, torch.device("cpu"), loaders, budget))  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", ALL)
def test_no_host_synchronisation(spec: str) -> None:
    """Nor a tensor of tokens x tokens at a length where that would matter."""
    compressor = parse(spec)
    assert not compressor.adaptive
    budget = 0 if spec == "todre-inner" else 5
    with Watch() as seen:
        compressor.select(both(30, budget))
    assert not seen.waits
    visual = both(3000, budget, batch=1, device="meta")  # no data: `tolist` and branches on content fail
    visual.attention, visual.features  # noqa: B018 - loaded before the watch starts
    with Watch() as seen:
        selection = compressor.select(visual)
    assert selection.index.shape == (1, budget) and selection.index.device.type == "meta"
    assert seen.largest <= 3000 * WIDTH


@pytest.mark.parametrize("spec", CHOOSING)
def test_a_callers_autocast_changes_nothing(spec: str) -> None:
    visual = both(30, 7)
    expected = parse(spec).select(visual).matrix()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(parse(spec).select(visual).matrix(), expected)


@pytest.mark.parametrize("spec", CHOOSING)
def test_gradients_stay_out_of_the_choice(spec: str) -> None:
    visual = both(17, 5)
    visual.features.requires_grad_()
    visual.attention.requires_grad_()
    selection = parse(spec).select(visual)
    assert selection.weight is None or not selection.weight.requires_grad
    assert torch.autograd.grad(selection.apply(visual.features).sum(), visual.features)[0].any()


@pytest.mark.parametrize("spec", DECODER_SPECS.values(), ids=DECODER_SPECS)
def test_the_cases_fit_a_small_model(spec: str) -> None:
    """The models of the laws have three decoder layers."""
    compressor = drive(spec)
    cuts, budgets = compressor.cuts(3), compressor.budgets(layout(16))
    assert len(cuts) == len(budgets) and max(budgets) < 16


def test_every_strategy_inside_the_language_model_is_here() -> None:
    assert {spec.partition(":")[0] for spec in DECODER_SPECS.values()} == set(NAMES)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("spec", CHOOSING)
def test_a_gpu_chooses_the_same_without_waiting(spec: str) -> None:
    expected = parse(spec).select(both(144, 50))
    there = both(144, 50, device="cuda")
    mode = torch.cuda.get_sync_debug_mode()
    there.attention, there.features  # noqa: B018 - loaded before the watch starts
    torch.cuda.set_sync_debug_mode("error")
    try:
        selection = parse(spec).select(there)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.equal(selection.index.cpu(), expected.index)
    assert torch.equal(selection.matrix().cpu(), expected.matrix())
