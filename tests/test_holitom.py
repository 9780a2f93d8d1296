"""HoliTom against plain loops in float64, written from the paper's formulas and the rules of its code."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vtc.compressor import parse, strategy
from vtc.errors import SpecError, UnsupportedModelError
from vtc.kernels import assign, density_peaks
from vtc.selection import Selection
from vtc.strategies.holitom import cluster, segments, shares
from vtc.visual import Encoder, Layout, View, Visual
from watch import Watch

SIZES = [(1, 2, 3), (2, 1, 1), (2, 3, 3), (3, 2, 2), (5, 3, 4), (8, 3, 3), (9, 1, 5)]  # frames, rows, columns
KINDS = ["mixed", "still", "moving", "one frame moves", "copies"]


def draw(kind: str, frames: int, width: int, seed: int = 0, channels: int = 16) -> tuple[Tensor, Tensor]:
    """Features `(T * P, D)` and saliency `(T * P,)` of a clip."""
    random = torch.Generator().manual_seed(seed)
    scene = torch.randn(width, channels, generator=random)
    noise = torch.randn(frames, width, channels, generator=random)
    if kind == "still":
        x = scene + noise / 20
    elif kind == "moving":
        x = noise
    elif kind == "one frame moves":
        x = scene + noise / 20
        x[frames // 2] = noise[frames // 2]
    elif kind == "copies":  # of two rows of signs, alternately still: cosines and distances are exact
        x = torch.where(scene[: min(2, width)] > 0, 1.0, -1.0)[
            torch.randint(0, min(2, width), (width,), generator=random)
        ]
        x = x.expand(frames, -1, -1) * torch.where(torch.arange(frames) // 4 % 2 == 0, 1.0, -1.0)[:, None, None]
    else:  # every place has its own pace
        x = scene + noise * torch.linspace(0.05, 0.9, width)[:, None]
    saliency = torch.rand(frames * width, generator=random)
    if kind == "copies":
        saliency = torch.randint(0, 3, (frames * width,), generator=random) / 64
    return x.reshape(frames * width, -1), saliency


def look(sizes: Layout, x: Tensor, saliency: Tensor) -> Visual:
    """`x` `(B, N, D)`, `saliency` `(B, N)`."""
    loaders = {"features": lambda: x, "saliency": lambda: saliency[:, None]}
    return Visual(sizes, len(x), x.device, loaders)


# The reference


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b) / (math.sqrt(a @ a) * math.sqrt(b @ b))


def steady(x: np.ndarray, tau: float, a: int, b: int) -> list[int]:
    """Places of `x` `(T, P, D)` that are static from frame `a` to frame `b > a`."""
    return [p for p in range(x.shape[1]) if all(cosine(x[t, p], x[t + 1, p]) > tau for t in range(a, b))]


def reference_segments(x: np.ndarray, tau: float, window: int) -> list[tuple[int, int]]:
    best, choice = [0], []
    for i in range(len(x)):
        value, width = best[i], 1
        for w in range(2, min(i + 1, window) + 1):
            gain = best[i - w + 1] + len(steady(x, tau, i - w + 1, i)) * (w - 1)
            if gain > value:
                value, width = gain, w
        best.append(value)
        choice.append(width)
    found, i = [], len(x) - 1
    while i >= 0:
        found.append((i - choice[i] + 1, i))
        i -= choice[i]
    return found[::-1]


def reference_centres(rows: np.ndarray, count: int) -> list[int]:
    """Density peaks: the `count` rows of largest density times separation."""
    n, near = len(rows), min(7, count)
    distance = [[math.dist(a, b) / math.sqrt(rows.shape[1]) for b in rows] for a in rows]
    density = [math.exp(-sum(sorted(d * d for d in distance[i])[:near]) / near) for i in range(n)]
    order = sorted(range(n), key=lambda i: (-density[i], i))
    gap = {order[0]: max(max(row) for row in distance)}
    for at, i in enumerate(order[1:], 1):
        gap[i] = min(distance[i][j] for j in order[:at])
    return sorted(sorted(range(n), key=lambda i: (-density[i] * gap[i], i))[:count])


def reference(
    x: Tensor, saliency: Tensor, frames: int, tau: float, beta: float, window: int, budget: int, wanted: float | None
) -> dict[int, Tensor]:
    """What survives, by place: features as merged. `wanted` makes the count depend on content, as published."""
    clip = x.double().view(frames, -1, x.shape[1])
    score = saliency.double().view(frames, -1).tolist()
    width, rows = clip.shape[1], clip.numpy()
    found = reference_segments(rows, tau, window)
    fixed = [steady(rows, tau, a, b) if b > a else [] for a, b in found]
    segment_of = [n for n, (a, b) in enumerate(found) for _ in range(a, b + 1)]
    moving = [[p for p in range(width) if p not in fixed[segment_of[t]]] for t in range(frames)]
    left = sum(map(len, fixed)) + sum(map(len, moving))
    assert left == frames * width - sum(len(places) * (b - a) for places, (a, b) in zip(fixed, found, strict=True))

    if wanted is not None:
        ratio = min(wanted / left, 1.0)
        clusters = [round(len(places) * ratio) for places in fixed]
        dynamic = [math.ceil(len(places) * ratio) for places in moving]
        if not any(clusters + dynamic):
            clusters[0] = 1
    else:
        sizes = [len(places) for places in fixed + moving]
        exact = [Fraction(size * min(budget, left), left) for size in sizes]
        counts = [math.floor(share) for share in exact]
        for n in sorted(range(len(sizes)), key=lambda n: (counts[n] - exact[n], n))[: min(budget, left) - sum(counts)]:
            counts[n] += 1
        clusters, dynamic = counts[: len(found)], counts[len(found) :]

    single: list[tuple[int, int]] = []
    if wanted is None and budget > left:
        later = [(t, p) for n, (a, b) in enumerate(found) for t in range(a + 1, b + 1) for p in fixed[n]]
        later.sort(key=lambda at: (cosine(rows[at[0] - 1, at[1]], rows[at]), at))
        single = later[: budget - left]

    kept = {t * width + p: clip[t, p] for t, p in single}
    for n, (a, b) in enumerate(found):
        if clusters[n]:
            means = [clip[[t for t in range(a, b + 1) if (t, p) not in single], p].mean(0) for p in fixed[n]]
            centres = reference_centres(torch.stack(means).numpy(), clusters[n])
            groups: dict[int, list[Tensor]] = {c: [] for c in centres}
            for i, mean in enumerate(means):
                if i not in centres:
                    groups[min(centres, key=lambda c: (math.dist(mean, means[c]), c))].append(mean)
            for c, others in groups.items():
                merged = beta * means[c] + (1 - beta) * torch.stack(others).mean(0) if others else means[c]
                kept[a * width + fixed[n][c]] = merged
        for t in range(a, b + 1):
            for p in sorted(moving[t], key=lambda p: (-score[t][p], p))[: dynamic[t]]:
                kept[t * width + p] = clip[t, p]
    return dict(sorted(kept.items()))


def check(selection: Selection, x: Tensor, row: int, expected: dict[int, Tensor]) -> None:
    assert selection.index[row].tolist() == list(expected)
    assert torch.allclose(selection.matrix()[row].sum(1), torch.ones(len(expected)))  # means, not sums
    merged = selection.apply(x)[row].double()
    assert torch.allclose(merged, torch.stack(list(expected.values())), atol=1e-5)


# Parity


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_budget(size: tuple[int, int, int], kind: str) -> None:
    frames, rows, columns = size
    # Not seed 1, by which two cosines that are ranked are 1e-7 apart: float32 cannot tell which is larger.
    clips = [draw(kind, frames, rows * columns, seed) for seed in (0, 2)]
    x, saliency = (torch.stack(part) for part in zip(*clips, strict=True))
    sizes = Layout.frames(*size, clip=True)
    for k in range(1, sizes.tokens + 1):
        selection = strategy("holitom")(keep=k).select(look(sizes, x, saliency))
        for row in range(2):
            expected = reference(x[row], saliency[row], frames, 0.8, 0.6, 1024, k, None)
            assert len(expected) == k
            check(selection, x, row, expected)


@pytest.mark.parametrize(("tau", "beta", "window"), [(0.65, 0.6, 1024), (0.95, 0.0, 3), (-1.0, 1.0, 4), (0.8, 0.6, 1)])
def test_every_parameter(tau: float, beta: float, window: int) -> None:
    sizes = Layout.frames(8, 3, 3)
    for seed, k in itertools.product(range(4), (1, 7, 20, 50)):
        x, saliency = draw("mixed", 8, 9, seed)
        compressor = strategy("holitom")(keep=k, tau=tau, beta=beta, window=window)
        selection = compressor.select(look(sizes, x[None], saliency[None]))
        check(selection, x[None], 0, reference(x, saliency, 8, tau, beta, window, k, None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_published_count(size: tuple[int, int, int], kind: str) -> None:
    frames, rows, columns = size
    sizes = Layout.frames(*size, clip=True)
    for keep, seed in itertools.product((0.1, 0.15, 0.25, 0.5, 0.9, 1, 4), range(2)):
        x, saliency = draw(kind, frames, rows * columns, seed)
        compressor = strategy("holitom")(keep=keep, fill=False)
        wanted = keep * sizes.tokens if isinstance(keep, float) else keep
        expected = reference(x, saliency, frames, 0.8, 0.6, 1024, 0, wanted)
        if compressor.budget(sizes) == sizes.tokens:
            expected = dict(enumerate(x.double()))
        check(compressor.select(look(sizes, x[None], saliency[None])), x[None], 0, expected)
    assert compressor.adaptive and not parse("holitom").adaptive


def test_a_still_clip_stays_short_as_published_and_is_filled_by_default() -> None:
    """The clamp: eight equal frames of nine tokens merge to nine, whatever was asked for."""
    x, saliency = draw("still", 8, 9)
    visual = look(Layout.frames(8, 3, 3), x[None], saliency[None])
    assert strategy("holitom")(keep=0.5, fill=False).select(visual).index.tolist() == [list(range(9))]
    filled = strategy("holitom")(keep=0.5).select(visual)
    assert filled.index.shape == (1, 36) and filled.index[0, :9].tolist() == list(range(9))
    assert (filled.sources() >= 0).all()  # what is given back survives on its own, the rest in its mean


# Segments, shares and clusters on their own


@pytest.mark.parametrize("window", [1, 2, 3, 1024])
def test_segments(window: int) -> None:
    for seed, frames in itertools.product(range(20), (1, 2, 3, 7, 12)):
        draws = torch.rand(2, frames - 1, 5, generator=torch.Generator().manual_seed(seed))
        same = draws > seed / 20
        start, end, static = segments(same, window)
        for row in range(2):
            # Features that turn by a right angle where they change: cosines are 0 or 1.
            turns = torch.cat([torch.zeros(1, 5), (~same[row]).float().cumsum(0)])
            x = torch.stack([(turns % 2 == 0).double(), (turns % 2 == 1).double()], dim=2).numpy()
            expected = reference_segments(x, 0.5, window)
            assert [(a, b) for a, b in expected for _ in range(a, b + 1)] == list(
                zip(start[row].tolist(), end[row].tolist(), strict=True)
            )
            for a, b in expected:
                places = steady(x, 0.5, a, b) if b > a else []
                assert all(static[row, t].nonzero()[:, 0].tolist() == places for t in range(a, b + 1))


def test_of_equal_segmentations_the_shorter_segment_comes_last() -> None:
    """Two places that are the same over three frames save four tokens as one segment. One that is the same from frame 0
    to 1 and another from 1 to 2 save one token either way: the last segment is a single frame."""
    together, torn = torch.ones(1, 2, 2, dtype=torch.bool), torch.eye(2, dtype=torch.bool)[None]
    assert segments(together, 9)[0].tolist() == [[0, 0, 0]]
    assert segments(torn, 9)[0].tolist() == [[0, 0, 2]]
    assert segments(together, 2)[0].tolist() == [[0, 0, 2]]


def test_the_threshold_itself_is_not_static() -> None:
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])[None]  # the first cosine is the float32 nearest to 0.6
    tau = float(torch.nn.functional.cosine_similarity(x[0, 0], x[0, 1], dim=0))
    visual = look(Layout.frames(3, 1, 1), x, torch.zeros(1, 3))
    at, below = (
        strategy("holitom")(keep=2, tau=value, fill=False)
        for value in (tau, float(np.nextafter(np.float32(tau), np.float32(0))))
    )
    assert at.select(visual).index.tolist() == [[0, 1]] and below.select(visual).index.tolist() == [[0]]


def test_shares() -> None:
    for seed in range(20):
        parts = torch.randint(0, 6, (3, 8), generator=torch.Generator().manual_seed(seed))
        whole = parts.sum(1, keepdim=True)
        for kept in range(int(whole.min()) + 1):
            given = shares(parts, torch.full_like(whole, kept), whole)
            assert (given.sum(1) == kept).all() and (given <= parts).all()
            assert ((given - parts * kept / whole).abs() < 1).all()


@pytest.mark.parametrize("count", range(1, 13))
def test_clusters_of_a_whole_set_are_those_of_the_kernels(count: int) -> None:
    """From seven clusters on there are seven neighbours."""
    rows = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(count))
    everything = torch.ones(3, 12, dtype=torch.bool)
    owner, weight = cluster(rows, everything, torch.full((3, 1), count), 0.6)
    centres = density_peaks(rows, count, neighbours=min(7, count)).sort(dim=1).values
    assert torch.equal(owner, centres.gather(1, assign(rows, centres, euclidean=True)))
    assert torch.allclose(torch.zeros(3, 12).scatter_add_(1, owner, weight).gather(1, centres), torch.ones(3, count))


def test_clusters_see_only_their_own_set() -> None:
    rows = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1)
    rows[1, 5:] = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) * 100
    valid = (torch.arange(9) < 5).expand(2, -1)
    owner, weight = cluster(rows, valid, torch.tensor([[2], [2]]), 0.6)
    assert torch.equal(owner[0], owner[1]) and torch.equal(weight[0], weight[1])
    assert (owner[:, 5:] == -1).all() and not weight[:, 5:].any()
    assert (cluster(rows, valid, torch.tensor([[0], [5]]), 0.6)[0][0] == -1).all()  # none asked for: all are dropped
    assert cluster(rows, valid, torch.tensor([[0], [5]]), 0.6)[0][1].tolist() == [0, 1, 2, 3, 4] + [-1] * 4


def test_indistinguishable_rows_go_to_the_lowest() -> None:
    rows, everything = torch.ones(1, 6, 4), torch.ones(1, 6, dtype=torch.bool)
    for _ in range(3):
        owner, weight = cluster(rows, everything, torch.tensor([[2]]), 0.6)
        assert owner.tolist() == [[0, 1, 0, 0, 0, 0]]
        assert torch.allclose(weight, torch.tensor([[0.6, 1.0, 0.1, 0.1, 0.1, 0.1]]))


# Layouts


@pytest.mark.parametrize("separators", [1, 3])
def test_the_newline_at_the_end_counts(separators: int) -> None:
    plain, sizes = Layout.frames(4, 2, 3), Layout.frames(4, 2, 3, separators=separators)
    x, saliency = draw("mixed", 4, 6)
    ending = torch.randn(separators, x.shape[1])
    whole = look(sizes, torch.cat([x, ending])[None], torch.cat([saliency, torch.zeros(separators)])[None])
    for k in range(separators + 1, 24 + separators + 1):
        selection = strategy("holitom")(keep=k).select(whole)
        alone = strategy("holitom")(keep=k - separators).select(look(plain, x[None], saliency[None]))
        assert selection.index.tolist() == [alone.index[0].tolist() + list(range(24, 24 + separators))]
        assert torch.equal(selection.apply(whole.features), torch.cat([alone.apply(x[None]), ending[None]], dim=1))
    for k in range(1, separators + 1):  # no room for more than the newline: for less than it
        assert (strategy("holitom")(keep=k).select(whole).index < 24).all()
    published = strategy("holitom")(keep=0.5, fill=False)
    inside = published.select(look(plain, x[None], saliency[None])).index[0].tolist()
    assert published.select(whole).index[0].tolist() == inside + list(range(24, 24 + separators))


def test_newlines_after_every_row_are_no_candidates() -> None:
    sizes = Layout(24, tuple(View(8 * t, 2, 3, separators=1) for t in range(3)), clip=True)
    cells = [place for view in sizes.views for place in view.places()]
    x, saliency = draw("mixed", 3, 6)
    wide, score = torch.randn(24, x.shape[1]), torch.ones(24)
    wide[cells], score[cells] = x, saliency
    for k in range(1, 25):
        selection = strategy("holitom")(keep=k).select(look(sizes, wide[None], score[None]))
        inside = strategy("holitom")(keep=min(k, 18)).select(look(Layout.frames(3, 2, 3), x[None], saliency[None]))
        index = selection.index[0].tolist()
        assert [i for i in index if i in cells] == [cells[i] for i in inside.index[0].tolist()] and len(index) == k


def test_an_image_keeps_what_is_salient() -> None:
    saliency = torch.tensor([[0.1, 0.5, 0.5, 0.2, 0.0, 0.9]])
    visual = look(Layout.frames(1, 2, 3), torch.randn(1, 6, 4), saliency)
    for spec in ("holitom:keep=3", "holitom:keep=0.5,fill=false"):
        selection = parse(spec).select(visual)
        assert selection.index.tolist() == [[1, 2, 5]] and not selection.merges


def test_frames_of_several_sizes_are_refused() -> None:
    sizes = Layout(13, (View(0, 3, 3), View(9, 2, 2)), clip=True)
    with pytest.raises(UnsupportedModelError, match="frames must be of one size"):
        parse("holitom:keep=3").select(look(sizes, torch.randn(1, 13, 4), torch.rand(1, 13)))


# What the promises ask


@pytest.mark.parametrize("options", [{"keep": 20}, {"keep": 50}, {"keep": 0.3, "fill": False}], ids=str)
def test_it_repeats_and_a_row_of_a_batch_equals_the_row_alone(options: dict[str, Any]) -> None:
    sizes = Layout.frames(8, 3, 3, separators=1)
    clips = [draw(kind, 8, 9, seed) for seed, kind in enumerate(KINDS)]
    x, saliency = (torch.stack(part) for part in zip(*clips, strict=True))
    x, saliency = torch.cat([x, x[:, :1]], dim=1), torch.cat([saliency, saliency[:, :1]], dim=1)  # and a newline
    compressor = strategy("holitom")(**options)
    alone = [compressor.select(look(sizes, x[n : n + 1], saliency[n : n + 1])) for n in range(5)]
    if not compressor.adaptive:
        together = compressor.select(look(sizes, x, saliency))
        assert torch.equal(together.index, torch.cat([one.index for one in alone]))
        assert torch.equal(together.apply(x), torch.cat([one.apply(x[n : n + 1]) for n, one in enumerate(alone)]))
        assert (together.index.diff(dim=1) > 0).all() and together.index.shape == (5, compressor.budget(sizes))
    for n, one in enumerate(alone):
        torch.manual_seed(n)
        again = compressor.select(look(sizes, x[n : n + 1], saliency[n : n + 1]))
        assert torch.equal(one.index, again.index) and torch.equal(one.matrix(), again.matrix())


@pytest.mark.parametrize("value", [0.0, 1.0, torch.nan, torch.inf])
def test_the_budget_survives_whatever_the_values_are(value: float) -> None:
    sizes = Layout.frames(5, 2, 3, separators=1)
    x, saliency = draw("mixed", 5, 6)
    x, saliency = torch.cat([x, x[:1]])[None].repeat(2, 1, 1), torch.cat([saliency, saliency[:1]])[None].repeat(2, 1)
    x[0], x[1, 7], saliency[0], saliency[1, 3] = value, value, value, value
    for k in range(1, 32):
        index = strategy("holitom")(keep=k).select(look(sizes, x, saliency)).index
        assert index.shape == (2, k) and (index.diff(dim=1) > 0).all() and (index >= 0).all() and (index < 31).all()


@pytest.mark.parametrize("size", [(1, 2, 3), (6, 3, 3)])
def test_the_device_is_not_waited_for(size: tuple[int, int, int]) -> None:
    sizes = Layout.frames(*size, separators=1, clip=True)
    visual = look(sizes, torch.randn(2, sizes.tokens, 8), torch.rand(2, sizes.tokens))
    with Watch() as seen:
        strategy("holitom")(keep=4).select(visual)
    assert not seen.waits
    empty = look(sizes, torch.empty(2, sizes.tokens, 8, device="meta"), torch.empty(2, sizes.tokens, device="meta"))
    assert strategy("holitom")(keep=4).select(empty).index.shape == (2, 4)


def test_a_callers_autocast_changes_nothing() -> None:
    x, saliency = draw("still", 8, 9)
    visual = look(Layout.frames(8, 3, 3), x[None], saliency[None])
    expected = strategy("holitom")(keep=5).select(visual)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        selection = strategy("holitom")(keep=5).select(visual)
    assert torch.equal(selection.index, expected.index) and torch.equal(selection.weight, expected.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("fill", [True, False])
def test_a_clip_within_its_budget_is_left_alone(fill: bool) -> None:
    x, saliency = draw("still", 4, 6)
    for keep in (1.0, 24, 25):
        selection = strategy("holitom")(keep=keep, fill=fill).select(
            look(Layout.frames(4, 2, 3), x[None], saliency[None])
        )
        assert selection.index.tolist() == [list(range(24))] and torch.equal(selection.apply(x[None]), x[None])


def test_spec() -> None:
    compressor = parse("holitom")
    assert (compressor.keep, compressor.positions) == (0.15, "contiguous")
    assert compressor.needs == {"features", "received"}
    assert compressor.layers(Encoder(depth=27, feature_layer=25, class_token=False)) == (25,)


@pytest.mark.parametrize("options", ["tau=1.1", "tau=-2", "beta=-0.1", "beta=1.5", "window=0"])
def test_parameters_out_of_range(options: str) -> None:
    with pytest.raises(SpecError, match=options.replace(".", r"\.").partition("=")[0] + "="):
        parse(f"holitom:{options}")
