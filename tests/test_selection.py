"""The algebra of `Selection`: what applying, composing and taking mean, for pruning and for merging."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vtc.selection import Selection

B, N, C = 3, 11, 5


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def subset(size: int, k: int, seed: int) -> Tensor:
    """`(B, k)` ascending, a different set in each row."""
    return torch.rand(B, size, generator=draw(seed)).argsort(1)[:, :k].sort(1).values


def pruning(size: int, k: int, seed: int) -> Selection:
    return Selection(subset(size, k, seed), size)


def merging(size: int, k: int, seed: int, entries: int = 24) -> Selection:
    """Many to many: tokens that go to several survivors, to none, and twice to the same one; survivors of nothing."""
    generator = draw(seed)
    slot = torch.randint(0, k, (B, entries), generator=generator)
    source = torch.randint(0, size, (B, entries), generator=generator)
    return Selection(subset(size, k, seed), size, slot, source, torch.rand(B, entries, generator=generator))


def matrix(selection: Selection) -> Tensor:
    """`W` in float64, entry by entry."""
    dense = torch.zeros(*selection.index.shape, selection.size, dtype=torch.float64)
    for b in range(dense.shape[0]):
        if selection.slot is None or selection.source is None or selection.weight is None:
            for slot, place in enumerate(selection.index[b].tolist()):
                dense[b, slot, place] = 1
        else:
            for entry in range(selection.slot.shape[1]):
                dense[b, selection.slot[b, entry], selection.source[b, entry]] += selection.weight[b, entry].double()
    return dense


def features(size: int = N, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, size, C, generator=draw(99)).to(dtype)


MAKE = {"prune": pruning, "merge": merging}


def test_keep_puts_indices_into_raster_order() -> None:
    selection = Selection.keep(torch.tensor([[4, 0, 2], [1, 3, 0]]), 5)
    assert selection.index.tolist() == [[0, 2, 4], [0, 1, 3]]
    assert selection.size == 5 and not selection.merges


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("k", [1, 4, N])
def test_matrix_and_apply_are_the_map(kind: str, k: int) -> None:
    selection, x = MAKE[kind](N, k, seed=1), features()
    assert selection.merges == (kind == "merge")
    assert selection.matrix().shape == (B, k, N) and selection.matrix().dtype == torch.float32
    assert torch.allclose(selection.matrix().double(), matrix(selection))
    assert torch.allclose(selection.apply(x).double(), matrix(selection) @ x.double(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_apply_keeps_the_dtype_and_prunes_bit_for_bit(dtype: torch.dtype) -> None:
    x = features(dtype=dtype)
    kept = pruning(N, 4, seed=2)
    rows = torch.stack([x[b, kept.index[b]] for b in range(B)])
    assert torch.equal(kept.apply(x), rows) and kept.apply(x).dtype == dtype
    assert merging(N, 4, seed=2).apply(x).dtype == dtype


def test_merging_weighs_and_adds_in_float32() -> None:
    """Rounded to bfloat16 on the way, 0.3 x 256 and 0.3 x 255 are half a unit apart."""
    entry, weight = torch.tensor([[0, 1]]), torch.tensor([[0.3, 0.3]])
    merged = Selection(torch.zeros(1, 1, dtype=torch.long), 2, torch.zeros_like(entry), entry, weight)
    x = torch.tensor([[[256.0], [-255.0]]], dtype=torch.bfloat16)
    assert merged.apply(x).item() == pytest.approx(0.3, rel=0.01)


def test_apply_does_not_change_its_input() -> None:
    for make in MAKE.values():
        x = features()
        make(N, 4, seed=3).apply(x)
        assert torch.equal(x, features())


@pytest.mark.parametrize("second", MAKE)
@pytest.mark.parametrize("first", MAKE)
@pytest.mark.parametrize(("middle", "last"), [(6, 3), (N, 4), (6, 6), (5, 1)])
def test_then_is_one_after_the_other(first: str, second: str, middle: int, last: int) -> None:
    a, b, x = MAKE[first](N, middle, seed=4), MAKE[second](middle, last, seed=5), features()
    both, expected = a.then(b), b.apply(a.apply(x))
    assert both.size == N and both.index.shape == (B, last)
    assert both.merges == (a.merges or b.merges)
    if both.merges:
        assert torch.allclose(both.apply(x), expected, atol=1e-5)
    else:
        assert torch.equal(both.apply(x), expected)
    assert torch.equal(both.take(x), b.take(a.take(x)))  # positions follow the anchors, whatever is averaged
    assert (both.index.diff(dim=1) > 0).all()


def test_then_is_associative() -> None:
    a, b, c, x = merging(N, 8, 6), pruning(8, 6, 7), merging(6, 2, 8), features()
    left, right = a.then(b).then(c), a.then(b.then(c))
    assert torch.equal(left.index, right.index)
    assert torch.allclose(left.apply(x), right.apply(x), atol=1e-5)


def test_keeping_all_is_the_identity_of_then() -> None:
    for make in MAKE.values():
        selection, x = make(N, 4, seed=9), features()
        before = Selection(torch.arange(N).expand(B, -1), N).then(selection)
        after = selection.then(Selection(torch.arange(4).expand(B, -1), 4))
        for other in (before, after):
            assert torch.equal(other.index, selection.index)
            assert torch.allclose(other.apply(x), selection.apply(x), atol=1e-6)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(
    ("shape", "dim"), [((B, N), 1), ((B, N, 4), 1), ((B, 3, N), 2), ((B, 1, N, N), 2), ((B, 1, 4, N), 3)]
)
def test_take_gathers_along_a_dimension(kind: str, shape: tuple[int, ...], dim: int) -> None:
    selection = MAKE[kind](N, 4, seed=10)
    x = torch.randint(0, 10**6, shape, generator=draw(1))
    expected = torch.stack([x[b].index_select(dim - 1, selection.index[b]) for b in range(B)])
    assert torch.equal(selection.take(x, dim), expected)


def test_take_keeps_booleans() -> None:
    mask = torch.rand(B, N, generator=draw(2)) > 0.5
    assert torch.equal(pruning(N, 4, 10).take(mask), mask.gather(1, pruning(N, 4, 10).index))


def test_nothing_may_survive() -> None:
    nothing, x = Selection(torch.zeros(B, 0, dtype=torch.long), N), features()
    assert nothing.apply(x).shape == (B, 0, C) and nothing.take(torch.ones(B, 1, 4, N), 3).shape == (B, 1, 4, 0)
    assert nothing.matrix().shape == (B, 0, N)
    assert torch.equal(nothing.sources(), torch.full((B, N), -1))
    assert Selection.keep(nothing.index, N).apply(x).shape == (B, 0, C)


@pytest.mark.parametrize("kind", MAKE)
def test_nothing_survives_composed(kind: str) -> None:
    """What a merge had put together goes with it; what is merged from nothing is nothing."""
    x, first = features(), MAKE[kind](N, 4, seed=12)
    nothing = Selection(torch.zeros(B, 0, dtype=torch.long), 4)
    again = Selection(torch.zeros(B, 0, dtype=torch.long), 0)
    for both in (first.then(nothing), first.then(nothing).then(again)):
        assert both.size == N and both.index.shape == (B, 0)
        assert both.apply(x).shape == (B, 0, C) and both.take(x).shape == (B, 0, C)
        assert both.matrix().shape == (B, 0, N) and torch.equal(both.sources(), torch.full((B, N), -1))


def test_sources_of_pruning() -> None:
    assert Selection(torch.tensor([[0, 2], [1, 3]]), 4).sources().tolist() == [[0, -1, 1, -1], [-1, 0, -1, 1]]


def test_sources_of_merging_name_the_largest_share() -> None:
    slot = torch.tensor([[0, 1, 0, 1, 1, 1]])
    source = torch.tensor([[0, 0, 2, 2, 3, 4]])
    weight = torch.tensor([[0.2, 0.8, 0.5, 0.5, 0.0, 1.0]])
    # token 0 mostly to 1; token 1 to none; token 2 evenly: the first; token 3 with no weight: dropped
    assert Selection(torch.tensor([[0, 4]]), 5, slot, source, weight).sources().tolist() == [[1, -1, 0, -1, 1]]


def test_repeated_entries_add_up() -> None:
    entry = torch.zeros(1, 2, dtype=torch.long)
    selection = Selection(torch.tensor([[0]]), 2, entry, entry, torch.tensor([[0.25, 0.5]]))
    assert selection.matrix().tolist() == [[[0.75, 0.0]]]
    assert selection.apply(torch.tensor([[[4.0], [8.0]]])).tolist() == [[[3.0]]]


def test_gradients_flow_through_features() -> None:
    for make in MAKE.values():
        selection, x = make(N, 4, seed=11), features().requires_grad_()
        (gradient,) = torch.autograd.grad(selection.apply(x).sum(), x)
        assert torch.allclose(gradient, selection.matrix().sum(1)[..., None].expand(-1, -1, C), atol=1e-6)


@pytest.mark.parametrize(
    "index", [torch.zeros(3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 3)]
)
def test_bad_index_is_refused(index: Tensor) -> None:
    with pytest.raises(ValueError, match=r"int64 of shape \(B, K\)"):
        Selection(index, 5)


def test_entries_come_together_and_in_one_shape() -> None:
    index = entry = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="all three"):
        Selection(index, 5, slot=entry)
    with pytest.raises(ValueError, match="all three"):
        Selection(index, 5, slot=entry, source=entry)
    with pytest.raises(ValueError, match="same shape"):
        Selection(index, 5, entry, entry, torch.ones(1, 3))


def test_sizes_have_to_fit_to_compose() -> None:
    with pytest.raises(ValueError, match="first keeps 4 tokens, the second expects 5"):
        pruning(N, 4, 1).then(pruning(5, 2, 1))


def test_pruning_a_merge_adds_no_entries() -> None:
    """Composition stays sparse where it can: memory is that of the merge, not of a dense map."""
    entries = torch.tensor([[0, 0, 1, 2, 2, 2]]), torch.tensor([[0, 1, 2, 3, 4, 5]]), torch.ones(1, 6)
    merge = Selection(torch.tensor([[0, 2, 3]]), 6, *entries)
    prune = Selection(torch.tensor([[0, 2]]), 3)
    x = torch.randn(1, 6, 4)
    both = merge.then(prune)
    assert both.weight is not None and both.weight.shape == (1, 6)
    assert torch.equal(both.apply(x), prune.apply(merge.apply(x)))
    assert both.index.tolist() == [[0, 3]]
    late = Selection(torch.tensor([[1, 2, 5]]), 6).then(Selection(torch.tensor([[0]]), 3, *(e[:, :2] for e in entries)))
    assert late.source is not None and late.source.tolist() == [[1, 2]]
    assert late.index.tolist() == [[1]]
