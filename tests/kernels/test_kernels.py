"""Every operation against loops in float64: the torch references here, the Triton kernels by `test_proofs.py`.

That runs this file again in Triton's interpreter, with memory that is poisoned and guarded, and with programs in the
opposite order. So sizes are small: an operation of the interpreter takes as long as a hundred thousand of the chip.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import loops
import pytest
import torch
from torch import Tensor

from vtc import kernels
from watch import Watch

# One sum of N products in another order: some roundings of 2^-24, on values that are averages. Measured: 2e-7.
CLOSE = 2e-6
SIGNS = 16  # in 16 dimensions, lengths and cosines of signs are exact in float32, so ties are ties

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def subset(batch: int, n: int, k: int, seed: int = 0) -> Tensor:
    return uniform(batch, n, seed=seed).argsort(1)[:, :k]


def error(value: Tensor, expected: Tensor) -> float:
    """Relative error in the Euclidean norm; NaN, which is larger than nothing, wherever `value` has one."""
    assert value.shape == expected.shape
    return float((value.double() - expected.double()).norm() / expected.double().norm())


# --- greedy selection


@every_dtype
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 2), (17, 17), (49, 12), (131, 9)])
@pytest.mark.parametrize("objective", ["k-center", "max-sum", "weighted", "isolated"])
def test_greedy(objective: str, n: int, k: int, dtype: torch.dtype) -> None:
    x = draw(2, n, 24, seed=n, dtype=dtype) + 0.3
    first, weight = torch.tensor([n // 2, n - 1]), uniform(2, n, seed=n)
    if objective == "max-sum":
        order = kernels.max_sum(x, k, first)
    else:
        given = weight if objective == "weighted" else None
        order = kernels.k_center(x, k, None if objective == "isolated" else first, given)
    assert order.dtype == torch.long
    for row, found, start, share in zip(x, order.tolist(), first.tolist(), weight.tolist(), strict=True):
        start = loops.most_isolated(row) if objective == "isolated" else start
        join = math.fsum if objective == "max-sum" else max
        assert found == loops.greedy(row, k, start, join, share if objective == "weighted" else None)


@pytest.mark.parametrize("distinct", [3, 30])
@pytest.mark.parametrize("objective", ["k-center", "max-sum", "isolated"])
def test_ties_go_to_the_lowest_index(objective: str, distinct: int) -> None:
    """Duplicates, equal and opposite rows, and rows without a direction."""
    x = torch.where(draw(1, distinct, SIGNS, seed=distinct) < 0, -1.0, 1.0)[:, torch.arange(33) % distinct]
    x[:, 7::9] = 0.0
    x[:, 5] = torch.nan
    x[0, 11, 3] = torch.inf
    first = torch.tensor([4])
    greedy = kernels.max_sum if objective == "max-sum" else kernels.k_center
    start = loops.most_isolated(x[0]) if objective == "isolated" else 4
    expected = loops.greedy(x[0], 33, start, math.fsum if objective == "max-sum" else max)
    assert greedy(x, 33, None if objective == "isolated" else first).tolist() == [expected]
    assert kernels.most_isolated(x).tolist() == [loops.most_isolated(x[0])]


@pytest.mark.parametrize("value", [0.0, 0.3, torch.nan])
def test_no_row_is_picked_twice(value: float) -> None:
    x, first = torch.full((2, 19, 5), value), torch.tensor([4, 0])
    relevance = torch.full((2, 19), torch.nan if value == 0.3 else 1.0)
    for order in (
        kernels.k_center(x, 19, first),
        kernels.max_sum(x, 19, first),
        kernels.k_center(x, 19, first, relevance),
        kernels.dpp(x, relevance, 19),
    ):
        assert order.sort(dim=1).values.tolist() == [list(range(19))] * 2


def test_most_isolated_of_rows_that_are_all_opposed() -> None:
    """Here what is not a row, whose cosine would be 0, would be nearer than every row."""
    x = torch.tensor([[[1.0, 0.1], [-0.4, 0.9], [-0.7, -0.7]]])
    assert kernels.most_isolated(x).tolist() == [loops.most_isolated(x[0])] == [2]
    assert kernels.k_center(x, 3).tolist() == [loops.greedy(x[0], 3, 2, max)]


def test_lengths_do_not_count() -> None:
    x, first = draw(1, 29, 12, seed=3), torch.tensor([8])
    longer = x * torch.logspace(-6, 6, 29)[:, None]
    assert torch.equal(kernels.k_center(longer, 9, first), kernels.k_center(x, 9, first))
    assert torch.equal(kernels.dpp(longer, uniform(1, 29), 9), kernels.dpp(x, uniform(1, 29), 9))


@every_dtype
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 2), (17, 17), (49, 12)])
def test_dpp(n: int, k: int, dtype: torch.dtype) -> None:
    x, relevance = draw(2, n, 24, seed=n, dtype=dtype) + 0.3, uniform(2, n, seed=n) + 0.1
    order = kernels.dpp(x, relevance, k)
    for row, share, found in zip(x, relevance, order.tolist(), strict=True):
        assert found == loops.dpp(row, share, k)


def test_dpp_of_more_rows_than_dimensions_goes_on_by_index() -> None:
    x = draw(1, 20, 6, seed=1)
    x[0, 13] = x[0, 2]
    order = kernels.dpp(x, torch.ones(1, 20), 20)[0].tolist()
    assert order[:6] == loops.dpp(x[0], torch.ones(20), 6)
    assert order[6:] == [i for i in range(20) if i not in order[:6]]


# --- attention


@every_dtype
@pytest.mark.parametrize(("n", "heads", "groups", "width"), [(1, 1, 1, 64), (65, 3, 3, 72), (130, 6, 2, 80)])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_query_rows(
    n: int, heads: int, groups: int, width: int, queries: int, masked: bool, dtype: torch.dtype
) -> None:
    query = draw(2, queries, heads, width, seed=1, dtype=dtype)
    key = draw(2, groups, n, width, seed=2, dtype=dtype).transpose(1, 2)  # not contiguous, as heads often are
    mask = (uniform(2, n, seed=3) > 0.4) | (torch.arange(n) == n // 2) if masked else None
    rows = kernels.query_rows(query, key, width**-0.5, mask)
    assert rows.dtype == torch.float32
    for b in range(2):
        seen = torch.ones(queries, n, dtype=torch.bool) if mask is None else mask[b].expand(queries, -1)
        expected = loops.attention(query[b], key[b], width**-0.5, seen).mean(0)
        assert error(rows[b], expected) < CLOSE
        assert not rows[b][~seen].any()


def test_query_rows_over_many_keys() -> None:
    query, key = draw(1, 1, 1, 16, seed=1), draw(1, 1500, 1, 16, seed=2)
    expected = loops.attention(query[0], key[0], 1.0, torch.ones(1, 1500, dtype=torch.bool)).mean(0)
    assert error(kernels.query_rows(query, key, 1.0)[0], expected) < CLOSE


def test_query_rows_that_see_nothing_are_zero() -> None:
    mask = torch.tensor([[False] * 70, [True] * 70])
    rows = kernels.query_rows(draw(2, 2, 2, 64, seed=1), draw(2, 70, 2, 64, seed=2), 0.1, mask)
    assert not rows[0].any() and torch.allclose(rows[1].sum(1), torch.ones(2))


@pytest.mark.parametrize("width", [8, 96, 128, 256])
def test_query_rows_of_other_widths(width: int) -> None:
    query, key = draw(1, 1, 4, width, seed=1), draw(1, 9, 2, width, seed=2)
    expected = loops.attention(query[0], key[0], 0.1, torch.ones(1, 9, dtype=torch.bool)).mean(0)
    assert error(kernels.query_rows(query, key, 0.1)[0], expected) < CLOSE


def test_a_score_is_not_lost_to_large_numbers() -> None:
    """The softmax must be that of differences: these exponents are far out of range."""
    query, key = torch.full((1, 1, 1, 64), 30.0), draw(1, 70, 1, 64, seed=5)
    expected = loops.attention(query[0], key[0], 1.0, torch.ones(1, 70, dtype=torch.bool)).mean(0)
    assert error(kernels.query_rows(query, key, 1.0)[0], expected) < 1e-3  # scores of 600 have errors of 4e-5
    many = query.expand(1, 70, 1, 64).contiguous()
    assert error(kernels.received(many, key, 1.0), expected) < 1e-3


@every_dtype
@pytest.mark.parametrize(("n", "heads", "groups"), [(1, 1, 1), (67, 2, 2), (150, 4, 2)])
@pytest.mark.parametrize("width", [64, 72, 80, 96, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_received(n: int, heads: int, groups: int, width: int, causal: bool, dtype: torch.dtype) -> None:
    if n == 150 and dtype == torch.float16:
        n = 129  # another place of the edge of a tile
    query, key = (draw(1, n, g, width, seed=g + i, dtype=dtype) for i, g in enumerate((heads, groups)))
    score = kernels.received(query, key, width**-0.5, causal)
    assert error(score[0], loops.received(query[0], key[0], width**-0.5, causal)) < CLOSE


@pytest.mark.parametrize("causal", [False, True])
def test_received_of_a_batch(causal: bool) -> None:
    query, key = (draw(3, 2, 21, 64, seed=i).transpose(1, 2) for i in range(2))
    score = kernels.received(query, key, 0.1, causal)
    for b in range(3):
        assert error(score[b], loops.received(query[b], key[b], 0.1, causal)) < CLOSE


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [[1], [5, 0, 70, 1, 33], [129, 64]])
def test_received_of_different_lengths(lengths: list[int], kind: torch.dtype, causal: bool) -> None:
    query, key = draw(sum(lengths), 4, 72, seed=1), draw(sum(lengths), 2, 72, seed=2)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(kind)
    score = kernels.received_packed(query, key, offsets, max(lengths), 0.1, causal)
    parts = zip(score.split(lengths), query.split(lengths), key.split(lengths), strict=True)
    for found, q, k in parts:
        if len(k):
            assert error(found, loops.received(q, k, 0.1, causal)) < CLOSE


def test_received_is_the_gradient_of_attention() -> None:
    """An oracle from elsewhere: what a value receives is the derivative of the sum of the outputs."""
    query, key = draw(1, 2, 45, 64, seed=1), draw(1, 2, 45, 64, seed=2)
    value = torch.zeros(1, 2, 45, 64, requires_grad=True)
    torch.nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()
    assert value.grad is not None
    score = kernels.received(query.transpose(1, 2), key.transpose(1, 2), 64**-0.5)
    assert error(score[0], value.grad[0, :, :, 0].mean(0) / 45) < CLOSE


# --- assignment and merging


@every_dtype
@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 17), (49, 1), (61, 20), (200, 133)])
@pytest.mark.parametrize("euclidean", [False, True])
def test_assign(n: int, k: int, euclidean: bool, dtype: torch.dtype) -> None:
    x, keep = draw(2, n, 24, seed=n, dtype=dtype), subset(2, n, k, seed=k)
    slots = kernels.assign(x, keep, euclidean)
    assert slots.dtype == torch.long
    assert slots.tolist() == [
        loops.assign(row, chosen, euclidean) for row, chosen in zip(x, keep.tolist(), strict=True)
    ]


def test_ties_of_assignment_go_to_the_first_survivor() -> None:
    x = torch.where(draw(1, 5, SIGNS, seed=1) < 0, -1.0, 1.0)[:, torch.arange(40) % 5]
    x[:, 6] = 0.0
    keep = torch.tensor([[30, 2, 17, 12, 25, 6]])
    assert kernels.assign(x, keep).tolist() == [loops.assign(x[0], keep[0].tolist(), False)]


@every_dtype
@pytest.mark.parametrize(
    ("n", "kept", "entries", "channels"), [(1, 1, 1, 1), (11, 4, 24, 5), (40, 7, 100, 300), (9, 30, 9, 16)]
)
def test_merge(n: int, kept: int, entries: int, channels: int, dtype: torch.dtype) -> None:
    """Tokens that go to several survivors, to none, and twice to the same one; survivors of nothing."""
    x, weight = draw(2, n, channels, seed=1, dtype=dtype), uniform(2, entries, seed=2)
    slot, source = ((uniform(2, entries, seed=3 + i) * m).long() for i, m in enumerate((kept, n)))
    merged = kernels.merge(x, slot, source, weight, kept)
    assert merged.dtype == dtype
    # The result is rounded to its type once: by half a unit in the last place.
    close = {torch.float32: CLOSE, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    for b in range(2):
        assert error(merged[b], loops.merge(x[b], slot[b], source[b], weight[b], kept)) < close


def test_merge_of_channels_that_are_not_contiguous() -> None:
    x, entry = draw(1, 6, 9, seed=1).transpose(1, 2), torch.arange(9)[None]
    assert torch.equal(kernels.merge(x, entry, entry, torch.ones(1, 9), 9), x)


def test_addresses_beyond_32_bits() -> None:
    """Rows 2^30 elements apart. Only the pages that are written exist."""
    step = 2**30
    far = torch.empty(2 * step + 64, dtype=torch.float16).as_strided((3, 64), (step, 1))
    far.copy_(draw(3, 64, seed=7))
    near, entry = far.contiguous(), torch.arange(3)[None]
    assert torch.equal(kernels.merge(far[None], entry, entry, torch.ones(1, 3), 3), near[None])
    query = draw(3, 1, 64, seed=8, dtype=torch.float16)
    for q, k in ((query, far[:, None]), (far[:, None], query)):
        expected = loops.received(q, k, 0.1, False)
        assert error(kernels.received_packed(q, k, torch.tensor([0, 3]), 3, 0.1), expected) < CLOSE
    expected = loops.attention(query, far[:, None], 0.1, torch.ones(3, 3, dtype=torch.bool)).mean(0)
    assert error(kernels.query_rows(query[None], far[None, :, None], 0.1)[0], expected) < CLOSE


# --- clusters and frames


@every_dtype
@pytest.mark.parametrize(("n", "k", "neighbours"), [(1, 1, 7), (2, 2, 1), (17, 17, 3), (49, 12, 7), (150, 20, 5)])
def test_density_peaks(n: int, k: int, neighbours: int, dtype: torch.dtype) -> None:
    x = draw(2, n, 24, seed=n, dtype=dtype)
    centres = kernels.density_peaks(x, k, neighbours)
    assert centres.tolist() == [loops.density_peaks(row, k, min(neighbours, n)) for row in x]


def test_density_peaks_of_equal_rows_go_by_index() -> None:
    x = torch.where(draw(1, 4, SIGNS, seed=2) < 0, -1.0, 1.0)[:, torch.arange(24) % 4]
    assert kernels.density_peaks(x, 8, 3).tolist() == [loops.density_peaks(x[0], 8, 3)]
    assert kernels.density_peaks(torch.zeros(1, 9, 3), 9, 3).tolist() == [list(range(9))]


def test_densities_that_underflow_still_have_an_order() -> None:
    x = draw(1, 30, 8, seed=4)
    far = kernels.density_peaks(x * 1000, 30, 1)[0].tolist()  # with one neighbour, itself, all densities are 1
    assert far == loops.density_peaks(x[0], 30, 1)
    spread = kernels.density_peaks(x * 1000, 30, 4)[0].tolist()  # exp(-1e6) is 0 in every floating type
    assert sorted(spread) == list(range(30)) and spread != list(range(30))


@every_dtype
def test_frame_similarity(dtype: torch.dtype) -> None:
    frames = draw(4, 7, 33, seed=1, dtype=dtype)
    expected = [[loops.cosines(frames[t : t + 2, n])[0][1] for n in range(7)] for t in range(3)]
    assert error(kernels.frame_similarity(frames), torch.tensor(expected)) < CLOSE


@every_dtype
@pytest.mark.parametrize("width", [16, 48, 896, 3584])
def test_cosines_of_copies_are_one(width: int, dtype: torch.dtype) -> None:
    x = draw(1, 50, width, seed=width, dtype=dtype) * torch.logspace(-3, 3, 50, dtype=dtype)[:, None]
    still = kernels.frame_similarity(torch.cat([x, x.clone(), -x, 0 * x, x]))
    assert still[0].eq(1).all() and still[1].eq(-1).all() and still[2:].eq(0).all()


# --- what runs inside the operators, which no mode sees from outside


def watch(operation: str, function: str, *inputs: Any) -> Watch:
    """The implementation that is being tested: the reference, or where there is none, the kernel."""
    package = importlib.import_module(f"vtc.kernels.{operation}")
    chosen = package.naive or importlib.import_module(f"vtc.kernels.{operation}.triton")
    with Watch() as seen:
        getattr(chosen, function)(*inputs)
    assert not seen.waits
    return seen


def test_nothing_waits_for_the_device() -> None:
    x, first, share = draw(2, 40, 16), torch.tensor([3, 4]), uniform(2, 40)
    for start, weight in ((None, None), (first, share)):
        watch("greedy", "greedy", x, 5, start, weight, False)
    watch("greedy", "dpp", x, share, 5)
    watch("assign", "assign", x, subset(2, 40, 7), True)
    order = (share * 7).long().sort(dim=1)
    ends = torch.searchsorted(order.values, torch.arange(8).expand(2, -1).contiguous())
    watch("merge", "merge", x, order.indices, ends, order.indices, share)
    watch("peaks", "density_peaks", x, 5)
    watch("rows", "query_rows", x[:, :2, None], x[:, :, None], 0.1, share > 0.5)
    watch("received", "received", x.view(80, 1, 16), x.view(80, 1, 16), torch.tensor([0, 50, 80]), 50, 0.1, True)


def test_received_makes_no_map() -> None:
    n, heads = 300, 8
    query = draw(n, heads, 16)
    assert watch("received", "received", query, query, None, n, 0.1, False).largest < heads * n * n
