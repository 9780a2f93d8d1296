"""The selection primitives against loops written from their definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from vtc.select import centres, distinct, fit_grid, k_center, max_sum, most_isolated, others, shuffled, top_k, unit
from vtc.visual import Layout, View

# Signs in 16 dimensions: lengths, cosines and their sums are exact in float32, so ties are ties.
EXACT = 16


def signs(rows: int, distinct: int, seed: int, batch: int = 1) -> torch.Tensor:
    """`(B, rows, EXACT)` of at most `distinct` different rows of -1 and 1."""
    draw = torch.Generator().manual_seed(seed)
    table = torch.randint(0, 2, (batch, distinct, EXACT), generator=draw) * 2.0 - 1.0
    return table.gather(1, torch.randint(0, distinct, (batch, rows, 1), generator=draw).expand(-1, -1, EXACT))


def gaussian(rows: int, seed: int, batch: int = 1, width: int = 7) -> torch.Tensor:
    return torch.randn(batch, rows, width, generator=torch.Generator().manual_seed(seed))


def cosines(rows: torch.Tensor) -> list[list[float]]:
    """All cosines of `(N, D)`, in float64, one at a time."""
    x = rows.double().numpy()
    return [[cosine(a, b) for b in x] for a in x]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = math.sqrt(sum(a * a)) * math.sqrt(sum(b * b))
    return float(sum(a * b)) / lengths if lengths else 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("n", [1, 2, 3, 17, 400])
def test_top_k_is_best_first_and_breaks_ties_by_index(n: int, dtype: torch.dtype) -> None:
    score = torch.randint(0, max(2, n // 3), (3, n), generator=torch.Generator().manual_seed(n)).to(dtype)
    for k in {1, n // 2 + 1, n}:
        expected = [sorted(range(n), key=lambda i: (-row[i], i))[:k] for row in score.tolist()]
        assert top_k(score, k).tolist() == expected


def test_unit_rows_have_length_one_and_no_direction_means_zero() -> None:
    x = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [-0.5, 0.0], [torch.inf, 1.0], [torch.nan, 1.0], [1e-20, 0.0]]])
    rows = unit(x.requires_grad_())
    assert not rows.requires_grad and rows.dtype == torch.float32
    assert torch.allclose(rows[0, :5], torch.tensor([[0.6, 0.8], [0, 0], [-1, 0], [0, 0], [0, 0]]))
    assert rows.isfinite().all()
    assert unit(torch.ones(1, 1, 4, dtype=torch.bfloat16)).tolist() == [[[0.5] * 4]]


def test_unit_leaves_its_input_alone() -> None:
    x = torch.tensor([[[3.0, 4.0], [torch.nan, 1.0]]])
    unit(x)
    assert x[0, 0].tolist() == [3.0, 4.0] and x[0, 1].isnan().tolist() == [True, False]


@pytest.mark.parametrize("block", [1, 4, 17, 512])
@pytest.mark.parametrize("n", [1, 2, 3, 17, 49])
@pytest.mark.parametrize("kind", ["gaussian", "signs"])
def test_most_isolated(kind: str, n: int, block: int) -> None:
    x = gaussian(n, seed=n, batch=3) if kind == "gaussian" else signs(n, distinct=2 * n, seed=n, batch=3)
    expected = []
    for row in x:
        table = cosines(row)
        nearest = [max((table[i][j] for j in range(n) if j != i), default=-1.0) for i in range(n)]
        expected.append(min(range(n), key=lambda i: (nearest[i], i)))
    assert most_isolated(unit(x), block).tolist() == expected


def test_a_copy_is_a_neighbour() -> None:
    """Only the row itself is left out of its neighbours: two equal rows far from the others are not isolated."""
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]])
    assert most_isolated(unit(x)).tolist() == [2]


@pytest.mark.parametrize("kind", ["gaussian", "signs", "few signs", "zeros among signs"])
@pytest.mark.parametrize("n", [1, 2, 3, 17, 49])
@pytest.mark.parametrize(("greedy", "join"), [(k_center, max), (max_sum, math.fsum)])
def test_greedy_order(greedy, join, n: int, kind: str) -> None:
    x = gaussian(n, seed=n, batch=2) if kind == "gaussian" else signs(n, 3 if kind == "few signs" else n, n, batch=2)
    if kind == "zeros among signs":
        x[:, ::3] = 0.0
    first = torch.tensor([n // 2, n - 1])
    expected = []
    for row, start in zip(x, first.tolist(), strict=True):
        table, order = cosines(row), [start]
        while len(order) < n:
            cost = {i: join([table[i][j] for j in order]) for i in range(n) if i not in order}
            order.append(min(cost, key=lambda i: (cost[i], i)))
        expected.append(order)
    for k in range(1, n + 1):
        assert greedy(unit(x), k, first).tolist() == [order[:k] for order in expected]


@pytest.mark.parametrize("greedy", [k_center, max_sum])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.3, torch.nan])
def test_greedy_never_picks_twice(greedy, value: float) -> None:
    """All rows equal: whatever rounding makes of their cosines, indices are distinct."""
    order = greedy(unit(torch.full((2, 33, 5), value)), 33, torch.tensor([4, 0]))
    assert order.sort(dim=1).values.tolist() == [list(range(33))] * 2
    assert order[:, 0].tolist() == [4, 0]


@pytest.mark.parametrize("greedy", [k_center, max_sum])
def test_greedy_does_not_follow_a_callers_autocast(greedy) -> None:
    x, first = unit(gaussian(300, seed=5, width=32)), torch.tensor([0])
    expected = greedy(x, 150, first), most_isolated(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        order, isolated = greedy(x, 150, first), most_isolated(x)
    assert torch.equal(order, expected[0]) and torch.equal(isolated, expected[1])


def test_centres() -> None:
    for n in range(1, 60):
        for k in range(n + 1):
            index = centres(k, n).tolist()
            assert index == [math.floor((u + 0.5) * n / k) for u in range(k)]
            assert len(set(index)) == k


def test_others() -> None:
    for n in range(1, 8):
        for k in range(n + 1):
            for index in itertools.permutations(range(n), k):
                left = [i for i in range(n) if i not in index]
                assert others(torch.tensor(index, dtype=torch.long), n).tolist() == left


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 17), (17, 1), (5, 5), (3, 8), (8, 3), (14, 27)])
def test_fit_grid(rows: int, columns: int) -> None:
    for k in range(1, rows * columns + 1):
        fits = {(h, w) for h in range(1, rows + 1) for w in range(1, columns + 1) if h * w <= k}
        full = [(h, w) for h, w in fits if (h + 1, w) not in fits and (h, w + 1) not in fits]
        stretch = {(h, w): max(h * columns, w * rows) * 10**9 // min(h * columns, w * rows) for h, w in full}
        assert fit_grid(rows, columns, k) == min(full, key=lambda g: (stretch[g], -g[0] * g[1], g))


@pytest.mark.parametrize(
    ("grid", "k", "expected"),
    [((24, 24), 576, (24, 24)), ((24, 24), 64, (8, 8)), ((24, 24), 57, (7, 8)), ((24, 24), 29, (5, 5)),
     ((10, 20), 50, (5, 10)), ((20, 10), 50, (10, 5)), ((24, 24), 1, (1, 1)), ((24, 24), 3, (1, 3))],
)  # fmt: skip
def test_fit_grid_by_hand(grid: tuple[int, int], k: int, expected: tuple[int, int]) -> None:
    assert fit_grid(*grid, k) == expected


def mix(value: int) -> int:
    """One output of SplitMix64, in Python integers."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def test_the_reference_hash_is_splitmix64() -> None:
    """Published outputs of the generator seeded with 0."""
    gamma = 0x9E3779B97F4A7C15
    outputs = [mix(gamma * i % 2**64) for i in range(3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("seed", [0, 1, -1, 12345, 2**63, 2**64 - 1, -(2**70)])
@pytest.mark.parametrize("n", [1, 2, 17, 576])
def test_shuffled_is_the_hash_and_nothing_else(n: int, seed: int) -> None:
    key = mix((mix(seed % 2**64) + n) % 2**64)
    hashes = [mix((key + i) % 2**64) for i in range(n)]
    signed = [value - 2**64 if value >= 2**63 else value for value in hashes]
    torch.manual_seed(seed % 7)
    assert shuffled(n, seed).tolist() == sorted(range(n), key=signed.__getitem__)


def test_shuffles_differ_between_seeds_and_are_not_biased() -> None:
    """Over many seeds every place comes first about equally often: chi-square of 20 cells, well below its 1e-6 tail."""
    n, seeds = 20, 2000
    first = [int(shuffled(n, seed)[0]) for seed in range(seeds)]
    expected = seeds / n
    assert sum((first.count(place) - expected) ** 2 / expected for place in range(n)) < 65
    assert len({tuple(shuffled(n, seed).tolist()) for seed in range(50)}) == 50


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ties_are_the_same_on_a_gpu() -> None:
    x = signs(700, distinct=90, seed=1, batch=2)
    first = torch.tensor([3, 600])
    for greedy in (k_center, max_sum):
        assert torch.equal(greedy(unit(x.cuda()), 200, first.cuda()).cpu(), greedy(unit(x), 200, first))
    assert torch.equal(most_isolated(unit(x.cuda())).cpu(), most_isolated(unit(x)))
    assert torch.equal(shuffled(700, 3, torch.device("cuda")).cpu(), shuffled(700, 3))
    score = torch.randint(0, 9, (2, 700)).float()
    assert torch.equal(top_k(score.cuda(), 200).cpu(), top_k(score, 200))


def test_separators_are_copies_of_the_first() -> None:
    canvas = Layout(4 + 3 * 3, (View(0, 2, 2), View(4, 3, 2, separators=1)))
    own, copies = distinct(canvas)
    assert own.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11] and copies.tolist() == [9, 12]
    for one_or_none in (Layout.frames(2, 2, 2), Layout.frames(2, 2, 2, separators=1)):
        own, copies = distinct(one_or_none)
        assert own.tolist() == list(range(one_or_none.tokens)) and not len(copies)
