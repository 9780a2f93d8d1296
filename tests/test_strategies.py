"""Every strategy against a plain reference, written from the paper's formula in float64 and without the library."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d

from vtc.compressor import Compressor, available, parse, strategy
from vtc.errors import SpecError
from vtc.select import places, proportional, separators
from vtc.selection import Selection
from vtc.visual import Encoder, Layout, View, Visual
from watch import Watch

GRIDS = [(1, 1, 1), (1, 1, 2), (1, 3, 1), (1, 1, 17), (1, 5, 5), (1, 5, 7), (1, 7, 7)]
CLIPS = [(2, 1, 1), (3, 2, 3), (5, 3, 3), (4, 5, 2)]
LAYOUTS = {
    "thumbnail and padded canvas": Layout(
        57, (View(0, 3, 3), View(9, 6, 7, separators=1, crops=(2, 2), box=(0.125, 0.0, 0.875, 0.875)))
    ),
    "thumbnail and wide canvas": Layout(24, (View(0, 2, 2), View(4, 2, 9, separators=1, crops=(1, 4)))),
    "canvas of the thumbnail's size": Layout(21, (View(0, 3, 3), View(9, 3, 3, separators=1))),
    "tiles": Layout(36, tuple(View(9 * tile, 3, 3) for tile in range(4))),
    "clip and newline": Layout.frames(3, 2, 3, separators=1),
    "clip of one frame and two separators": Layout.frames(1, 2, 3, separators=2, clip=True),
    "clip with a newline after every row": Layout(24, tuple(View(8 * t, 2, 3, separators=1) for t in range(3)), True),
}
KINDS = ["gaussian", "bfloat16", "signs", "few signs", "zeros among signs"]
CLIP_L = Encoder(depth=24, feature_layer=22, class_token=True)  # the tower of the papers


def layout(grid: tuple[int, int, int]) -> Layout:
    return Layout.frames(*grid)


def view(grid: tuple[int, int, int] | Layout, features: Tensor, saliency: Tensor | None = None) -> Visual:
    loaders = {"features": lambda: features} | ({} if saliency is None else {"saliency": lambda: saliency})
    sizes = grid if isinstance(grid, Layout) else layout(grid)
    return Visual(sizes, features.shape[0], features.device, loaders)


def draw_features(kind: str, tokens: int, batch: int = 2) -> Tensor:
    """`(B, N, 16)`. Signs have exact lengths, cosines and sums in float32, so that ties and copies are exact."""
    draw = torch.Generator().manual_seed(tokens)
    if "signs" not in kind:
        x = torch.randn(batch, tokens, 16, generator=draw)
        x = 3 + x / 10 if "alike" in kind else x  # cosines differ in the fourth digit
        return x.bfloat16() if "bfloat16" in kind else x
    x = torch.randint(0, 2, (batch, 3 if kind == "few signs" else tokens, 16), generator=draw) * 2.0 - 1.0
    x = x.gather(1, torch.randint(0, x.shape[1], (batch, tokens, 1), generator=draw).expand(-1, -1, 16)).clone()
    if kind == "zeros among signs":
        x[:, 1::3] = 0.0
    return x


def draw_saliency(tokens: int, rows: int = 1, levels: int = 0, batch: int = 2) -> Tensor:
    """`(B, R, N)` attention without its [CLS] column; `levels` makes ties."""
    draw = torch.Generator().manual_seed(tokens + rows)
    if levels:
        return torch.randint(0, levels, (batch, rows, tokens), generator=draw) / 64
    return torch.randn(batch, rows, tokens + 1, generator=draw).softmax(-1)[..., 1:]


def drive(name: str, tokens: int, **options: Any) -> Compressor:
    """The strategy with a budget of about a third, or all where it takes nothing else."""
    return strategy(name)(**({} if name == "none" else {"keep": max(1, tokens // 3)}) | options)


def picked(compressor: Compressor, visual: Visual) -> list[list[int]]:
    selection = compressor.select(visual)
    assert selection.size == visual.layout.tokens
    return selection.index.tolist()


def best(score: list[float], k: int) -> list[int]:
    return sorted(sorted(range(len(score)), key=lambda i: (-score[i], i))[:k])


def cosines(rows: Tensor) -> list[list[float]]:
    x = rows.double().numpy()
    return [[cosine(a, b) for b in x] for a in x]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = math.sqrt(sum(a * a)) * math.sqrt(sum(b * b))
    return float(sum(a * b)) / lengths if lengths else 0.0


# FasterVLM


@pytest.mark.parametrize("levels", [0, 1, 4])
@pytest.mark.parametrize("grid", GRIDS + CLIPS)
def test_fastervlm(grid: tuple[int, int, int], levels: int) -> None:
    tokens = math.prod(grid)
    saliency = draw_saliency(tokens, levels=levels)
    for k in range(1, tokens + 1):
        expected = [best(row[0].tolist(), k) for row in saliency]
        for kind in ("cls", "received"):
            compressor = strategy("fastervlm")(keep=k, saliency=kind)
            assert picked(compressor, view(grid, torch.empty(0), saliency)) == expected


def test_fastervlm_reads_one_row_and_no_features() -> None:
    assert parse("fastervlm").needs == {"cls"}
    assert parse("fastervlm:saliency=received").needs == {"received"}


@pytest.mark.parametrize(("spec", "layer"), [("", 22), (":layer=-1", 23), (":layer=-2", 22), (":layer=0", 0),
                                             (":layer=23", 23), (":layer=-24", 0)])  # fmt: skip
def test_fastervlm_layer(spec: str, layer: int) -> None:
    assert parse("fastervlm" + spec).layers(CLIP_L) == (layer,)


@pytest.mark.parametrize("layer", [24, -25, 100])
def test_fastervlm_layer_out_of_range(layer: int) -> None:
    with pytest.raises(SpecError, match=rf"layer {layer} .* has 24 layers, -24 to 23"):
        parse(f"fastervlm:layer={layer}").layers(CLIP_L)


# VTC-CLS


@pytest.mark.parametrize(("levels", "renorm"), [(0, False), (1, False), (4, False), (0, True)])
@pytest.mark.parametrize("grid", GRIDS)
def test_vtc_cls(grid: tuple[int, int, int], levels: int, renorm: bool) -> None:
    tokens = math.prod(grid)
    saliency = draw_saliency(tokens, rows=7, levels=levels)
    for k in range(1, tokens + 1):
        expected = []
        for rows in saliency.double().tolist():
            total = [0.0] * tokens
            for row in rows:
                scale = sum(row) if renorm else 1.0
                total = [a + b / scale for a, b in zip(total, row, strict=True)]
            expected.append(best(total, k))
        assert picked(strategy("vtc-cls")(keep=k, renorm=renorm), view(grid, torch.empty(0), saliency)) == expected


def test_vtc_cls_renorm_lets_a_faint_layer_vote() -> None:
    rows = torch.tensor([[[0.5, 0.4, 0.0], [0.0, 0.01, 0.0]]])  # the second layer attends to itself
    assert picked(parse("vtc-cls:keep=1"), view((1, 1, 3), torch.empty(0), rows)) == [[0]]
    assert picked(parse("vtc-cls:keep=1,renorm=true"), view((1, 1, 3), torch.empty(0), rows)) == [[1]]


def test_vtc_cls_survives_a_layer_without_attention() -> None:
    rows = torch.tensor([[[0.0, 0.0, 0.0], [0.1, 0.2, 0.3]]])
    assert picked(parse("vtc-cls:keep=1,renorm=true"), view((1, 1, 3), torch.empty(0), rows)) == [[2]]


def test_vtc_cls_needs() -> None:
    assert parse("vtc-cls").needs == {"cls"}
    assert parse("vtc-cls:saliency=received").needs == {"received"}


def test_vtc_cls_layers() -> None:
    assert parse("vtc-cls").layers(CLIP_L) == tuple(range(16, 23))  # as published
    assert parse("vtc-cls:start=-4").layers(CLIP_L) == (20, 21, 22)
    assert parse("vtc-cls:start=0").layers(CLIP_L) == tuple(range(23))
    for depth in range(1, 50):
        layers = parse("vtc-cls").layers(Encoder(depth, max(depth - 2, 0), True))
        assert layers and layers == tuple(range(layers[0], max(depth - 1, 1)))
        assert layers[0] == depth * 2 // 3 or len(layers) == 1


@pytest.mark.parametrize("start", [23, 24, -1, -25])
def test_vtc_cls_start_out_of_range(start: int) -> None:
    with pytest.raises(SpecError, match=rf"start={start} .* has 24 layers.* use 0 to 22"):
        parse(f"vtc-cls:start={start}").layers(CLIP_L)


# DivPrune


def reference_divprune(rows: Tensor) -> list[int]:
    """All tokens in the order of choice. Distance is one minus cosine; max-min, as in the paper's equations."""
    similarity = cosines(rows)
    tokens = range(len(similarity))
    distance = [[1.0 - value for value in row] for row in similarity]
    nearest = [min((distance[i][j] for j in tokens if j != i), default=0.0) for i in tokens]
    order = [max(tokens, key=lambda i: (nearest[i], -i))]
    while len(order) < len(tokens):
        gap = {i: min(distance[i][j] for j in order) for i in tokens if i not in order}
        order.append(max(gap, key=lambda i: (gap[i], -i)))
    return order


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [*GRIDS, CLIPS[1]])
def test_divprune(grid: tuple[int, int, int], kind: str) -> None:
    x = draw_features(kind, math.prod(grid))
    orders = [reference_divprune(row) for row in x]
    for k in range(1, x.shape[1] + 1):
        assert picked(strategy("divprune")(keep=k), view(grid, x)) == [sorted(order[:k]) for order in orders]


def test_divprune_takes_copies_last() -> None:
    x = torch.eye(4)[[0, 0, 1, 1, 2, 0]][None]
    assert picked(parse("divprune:keep=3"), view((1, 2, 3), x)) == [[0, 2, 4]]
    assert picked(parse("divprune:keep=4"), view((1, 2, 3), x)) == [[0, 1, 2, 4]]


# ToDRE


def reference_todre(rows: Tensor, pivot: int, objective: str) -> list[int]:
    """All tokens in the order of choice, from the pivot on."""
    similarity = cosines(rows)
    order = [pivot]
    while len(order) < len(similarity):
        rest = [i for i in range(len(similarity)) if i not in order]
        join = math.fsum if objective == "max-sum" else max
        order.append(min(rest, key=lambda i: (join([similarity[i][j] for j in order]), i)))
    return order


@pytest.mark.parametrize("objective", ["max-sum", "k-center"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [*GRIDS, CLIPS[1]])
def test_todre(grid: tuple[int, int, int], kind: str, objective: str) -> None:
    tokens = math.prod(grid)
    x, saliency = draw_features(kind, tokens), draw_saliency(tokens, levels=5)
    pivots = [best(row[0].tolist(), 1)[0] for row in saliency]
    orders = [reference_todre(row, pivot, objective) for row, pivot in zip(x, pivots, strict=True)]
    for k in range(1, tokens + 1):
        expected = [sorted(order[:k]) for order in orders]
        for pivot in ("cls", "received"):
            compressor = strategy("todre")(keep=k, objective=objective, pivot=pivot)
            assert picked(compressor, view(grid, x, saliency)) == expected


@pytest.mark.parametrize("kind", ["gaussian", "bfloat16", "alike", "alike bfloat16"])
@pytest.mark.parametrize("grid", GRIDS)
def test_todre_mean_pivot(grid: tuple[int, int, int], kind: str) -> None:
    x = draw_features(kind, math.prod(grid))
    for k in (1, (x.shape[1] + 1) // 2):
        expected = []
        for row in x.double().numpy():
            near = [cosine(token, row.mean(0)) for token in row]
            order = reference_todre(torch.tensor(row), max(range(len(near)), key=lambda i: (near[i], -i)), "max-sum")
            expected.append(sorted(order[:k]))
        assert picked(strategy("todre")(keep=k, pivot="mean"), view(grid, x)) == expected


def test_todre_random_pivot_depends_on_seed_and_size_alone() -> None:
    x = draw_features("gaussian", 35, batch=3)
    pivots = set()
    for seed in range(30):
        compressor = strategy("todre")(keep=1, pivot="random", seed=seed)
        rows = picked(compressor, view((1, 5, 7), x))
        torch.manual_seed(seed)
        assert rows == picked(compressor, view((1, 5, 7), -x)) and rows[0] == rows[1] == rows[2]
        pivots.add(rows[0][0])
        order = reference_todre(x[0], rows[0][0], "max-sum")
        more = strategy("todre")(keep=9, pivot="random", seed=seed)
        assert picked(more, view((1, 5, 7), x[:1])) == [sorted(order[:9])]
    assert len(pivots) > 10


@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS)
def test_todre_starts_in_the_thumbnail_if_there_is_one(sizes: Layout) -> None:
    """As in the paper. Of frames, and of tiles whose places are not known, any may have the pivot."""
    x, saliency = draw_features("gaussian", sizes.tokens, batch=8), torch.rand(8, 1, sizes.tokens)
    saliency[:, :, separators(sizes)] = 0.0
    images = [part for part in sizes.views if part.separators and not sizes.clip]
    among = sizes.views[0].stop if images else sizes.tokens
    pivots = [best(row[0, :among].tolist(), 1)[0] for row in saliency]
    for pivot in ("cls", "received"):
        assert picked(strategy("todre")(keep=1, pivot=pivot), view(sizes, x, saliency)) == [[one] for one in pivots]


def test_todre_needs_and_layer() -> None:
    assert parse("todre").needs == {"features", "cls"}
    assert parse("todre:pivot=received").needs == {"features", "received"}
    assert parse("todre:pivot=random").needs == parse("todre:pivot=mean").needs == {"features"}
    assert parse("todre").layers(CLIP_L) == (23,)


# Baselines


def test_none_keeps_everything() -> None:
    assert parse("none").keep == 1.0
    assert picked(parse("none"), view((1, 2, 3), torch.randn(2, 6, 4))) == [[0, 1, 2, 3, 4, 5]] * 2


@pytest.mark.parametrize("keep", [1, 64, 0.5, 0.999])
def test_none_refuses_a_budget(keep: float) -> None:
    with pytest.raises(SpecError, match=rf"keep={keep} was given, but 'none' keeps everything"):
        strategy("none")(keep=keep)


def mix(value: int) -> int:
    """One output of SplitMix64, in Python integers."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("grid", GRIDS + CLIPS)
def test_random(grid: tuple[int, int, int], seed: int) -> None:
    tokens = math.prod(grid)
    key = mix((mix(seed) + tokens) % 2**64)
    hashes = [(mix((key + i) % 2**64) + 2**63) % 2**64 for i in range(tokens)]  # compared as signed numbers
    order = sorted(range(tokens), key=hashes.__getitem__)
    for k in range(1, tokens + 1):
        assert (
            picked(strategy("random")(keep=k, seed=seed), view(grid, torch.randn(3, tokens, 4)))
            == [sorted(order[:k])] * 3
        )


def test_random_is_the_same_whatever_ran_before() -> None:
    visual = view((1, 24, 24), torch.empty(1, 576, 1))
    torch.manual_seed(0)
    first = picked(parse("random:keep=64"), visual)
    picked(parse("random:keep=64"), view((1, 5, 5), torch.empty(1, 25, 1)))
    assert picked(parse("random:keep=64"), visual) == first
    assert picked(parse("random:keep=64,seed=1"), visual) != first


def reference_fit(rows: int, columns: int, k: int) -> tuple[int, int]:
    """The grid that cannot grow, nearest in aspect, then largest, then lowest."""
    fits = {(h, w) for h in range(1, rows + 1) for w in range(1, columns + 1) if h * w <= k}
    full = [(h, w) for h, w in fits if (h + 1, w) not in fits and (h, w + 1) not in fits]
    stretch = {(h, w): abs(round(math.log(h * columns / (w * rows)), 9)) for h, w in full}
    return min(full, key=lambda g: (stretch[g], -g[0] * g[1], g))


def reference_uniform(grid: tuple[int, int, int], k: int) -> list[int]:
    frames, rows, columns = grid
    richer = [math.floor((u + 0.5) * frames / (k % frames)) for u in range(k % frames)]
    kept: list[int] = []
    for frame in range(frames):
        share = k // frames + (frame in richer)
        if share:
            h, w = reference_fit(rows, columns, share)
            down = [math.floor((u + 0.5) * rows / h) for u in range(h)]
            across = [math.floor((v + 0.5) * columns / w) for v in range(w)]
            cells = [y * columns + x for y in down for x in across]
            free = [cell for cell in range(rows * columns) if cell not in cells]
            left = share - h * w
            cells += [free[math.floor((u + 0.5) * len(free) / left)] for u in range(left)]
            kept += sorted(frame * rows * columns + cell for cell in cells)
    return kept


@pytest.mark.parametrize("grid", [*GRIDS, *CLIPS, (1, 3, 8), (1, 8, 3), (1, 12, 12)])
def test_uniform(grid: tuple[int, int, int]) -> None:
    tokens = math.prod(grid)
    for k in range(1, tokens + 1):
        expected = reference_uniform(grid, k)
        assert len(set(expected)) == k
        assert picked(strategy("uniform")(keep=k), view(grid, torch.empty(2, tokens, 0))) == [expected] * 2


def test_uniform_by_hand() -> None:
    visual = view((1, 4, 4), torch.empty(1, 16, 0))
    assert picked(parse("uniform:keep=4"), visual) == [[5, 7, 13, 15]]
    assert picked(parse("uniform:keep=1"), visual) == [[10]]
    assert picked(parse("uniform:keep=5"), visual) == [[5, 7, 8, 13, 15]]  # 8 is in the middle of the twelve others


def test_uniform_over_frames() -> None:
    """Two tokens for five frames; seven tokens for five frames of four."""
    assert picked(parse("uniform:keep=2"), view((5, 1, 1), torch.empty(1, 5, 0))) == [[1, 3]]
    kept = picked(parse("uniform:keep=7"), view((5, 2, 2), torch.empty(1, 20, 0)))[0]
    assert [sum(i // 4 == frame for i in kept) for frame in range(5)] == [1, 2, 1, 2, 1]


def reference_shares(total: int, sizes: list[int]) -> list[int]:
    """Rounded down; one more for the largest remainders, one after the other, the first among equals."""
    exact = [Fraction(total * size, sum(sizes)) for size in sizes]
    parts = [math.floor(share) for share in exact]
    while sum(parts) < total:
        parts[max(range(len(sizes)), key=lambda i: (exact[i] - parts[i], -i))] += 1
    return parts


@pytest.mark.parametrize("sizes", [[1], [3, 3], [16, 40], [7, 1, 5], [4, 4, 4, 4, 4], [1, 100]])
def test_proportional_shares(sizes: list[int]) -> None:
    for total in range(sum(sizes) + 1):
        shares = proportional(total, sizes)
        assert shares == reference_shares(total, sizes) and sum(shares) == total
        assert all(share <= size for share, size in zip(shares, sizes, strict=True))


def without_separators(sizes: Layout) -> list[int]:
    return [place for part in sizes.views for place in part.places()]


@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS)
def test_places_and_separators(sizes: Layout) -> None:
    cells = without_separators(sizes)
    assert places(sizes.views).tolist() == cells
    assert separators(sizes).tolist() == sorted(set(range(sizes.tokens)) - set(cells))


@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS)
def test_uniform_over_views(sizes: Layout) -> None:
    """Views share the budget, each is spread over on its own; separators come last of all."""
    cells = without_separators(sizes)
    rest = sorted(set(range(sizes.tokens)) - set(cells))
    grids = [(part.rows, part.columns) for part in sizes.views]
    for k in range(1, sizes.tokens + 1):
        seen = min(k, len(cells))
        if len(set(grids)) == 1:
            kept = [cells[i] for i in reference_uniform((len(grids), *grids[0]), seen)]
        else:
            kept = []
            for part, share in zip(sizes.views, reference_shares(seen, [h * w for h, w in grids]), strict=True):
                if share:
                    kept += [part.places()[i] for i in reference_uniform((1, part.rows, part.columns), share)]
        expected = sorted(kept + rest[: k - seen])
        assert len(set(expected)) == k
        assert picked(strategy("uniform")(keep=k), view(sizes, torch.empty(2, sizes.tokens, 0))) == [expected] * 2


@pytest.mark.parametrize("grid", [*GRIDS, (1, 3, 8), (1, 12, 12), *CLIPS])
def test_pool(grid: tuple[int, int, int]) -> None:
    frames, rows, columns = grid
    tokens = math.prod(grid)
    x = draw_features("gaussian", tokens)
    for k in range(1, tokens + 1):
        t = min(frames, k)
        h, w = reference_fit(rows, columns, k // t)
        compressor = strategy("pool")(keep=k)
        assert compressor.budget(layout(grid)) == t * h * w <= k
        selection = compressor.select(view(grid, x))
        volume = x.double().mT.unflatten(2, grid)  # (B, C, T, H, W)
        assert torch.allclose(
            selection.apply(x).double(), adaptive_avg_pool3d(volume, (t, h, w)).flatten(2).mT, atol=1e-6
        )
        if frames == 1:
            flat = adaptive_avg_pool2d(volume[:, :, 0], (h, w)).flatten(2).mT
            assert torch.allclose(selection.apply(x).double(), flat, atol=1e-6)
        assert torch.allclose(selection.matrix().sum(2), torch.ones(2, t * h * w))
        middle = [
            [math.floor((u + 0.5) * size / kept) for u in range(kept)]
            for size, kept in zip(grid, (t, h, w), strict=True)
        ]
        anchors = [(f * rows + y) * columns + z for f in middle[0] for y in middle[1] for z in middle[2]]
        assert selection.index.tolist() == [anchors] * 2
        assert (selection.matrix().gather(2, selection.index[..., None]) > 0).all()  # each stands inside its own block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_at_full_size_is_the_identity(dtype: torch.dtype) -> None:
    x = torch.randn(2, 70, 8).to(dtype)
    assert torch.equal(parse("pool:keep=1.0").select(view((2, 5, 7), x)).apply(x), x)


def test_pool_blocks_do_not_leak() -> None:
    """A value that is not finite spoils the blocks that hold it and no others."""
    x = torch.ones(1, 25, 1)
    x[0, 12] = torch.inf  # the middle of 5 x 5; blocks along an axis are [0, 2), [1, 4), [3, 5)
    pooled = parse("pool:keep=9").select(view((1, 5, 5), x)).apply(x)
    assert pooled.isfinite().flatten().tolist() == [place != 4 for place in range(9)]


@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS)
def test_pool_over_views(sizes: Layout) -> None:
    """Views of one size are pooled like frames; views that differ share the budget and are pooled on their own."""
    x = torch.randn(2, sizes.tokens, 4, generator=torch.Generator().manual_seed(0))
    cells = without_separators(sizes)
    grids = [(part.rows, part.columns) for part in sizes.views]
    for k in range(1, len(cells) + 1):
        if len(set(grids)) == 1:
            t = min(len(grids), k)
            kept = (t, *reference_fit(*grids[0], k // t))
            volume = x.double()[:, cells].mT.unflatten(2, (len(grids), *grids[0]))
            expected = adaptive_avg_pool3d(volume, kept).flatten(2).mT
        else:
            means = []
            for part, share in zip(sizes.views, reference_shares(k, [h * w for h, w in grids]), strict=True):
                if share:
                    volume = x.double()[:, part.places()].mT.unflatten(2, (part.rows, part.columns))
                    kept = reference_fit(part.rows, part.columns, share)
                    means.append(adaptive_avg_pool2d(volume, kept).flatten(2).mT)
            expected = torch.cat(means, dim=1)
        compressor = strategy("pool")(keep=k)
        selection = compressor.select(view(sizes, x))
        assert compressor.budget(sizes) == selection.index.shape[1] == expected.shape[1] <= k
        assert torch.allclose(selection.apply(x).double(), expected, atol=1e-6)
        assert (selection.index.diff(dim=1) > 0).all()
        assert (selection.matrix().gather(2, selection.index[..., None]) > 0).all()  # none of them on a separator


@pytest.mark.parametrize("sizes", [sizes for sizes in LAYOUTS.values() if separators(sizes).numel()])
def test_pool_keeps_separators_once_nothing_is_pooled(sizes: Layout) -> None:
    x, cells = torch.randn(2, sizes.tokens, 4), without_separators(sizes)
    rest = separators(sizes).tolist()
    for k in range(len(cells) + 1, sizes.tokens + 1):
        compressor, expected = strategy("pool")(keep=k), sorted(cells + rest[: k - len(cells)])
        selection = compressor.select(view(sizes, x))
        assert compressor.budget(sizes) == k and selection.index.tolist() == [expected] * 2
        assert torch.equal(selection.apply(x), x[:, expected])


# What holds for all of them

ALL = [
    "none", "random", "random:seed=5", "uniform", "pool", "fastervlm", "vtc-cls", "vtc-cls:renorm=true", "divprune",
    "todre", "todre:objective=k-center", "todre:pivot=random", "todre:pivot=mean", "holitom", "holitom:tau=-1.0",
    "globalcom2", "globalcom2:formula=code", "globalcom2:formula=zscore,saliency=mean",
]  # fmt: skip


SIZES = {str(grid): layout(grid) for grid in GRIDS + CLIPS} | LAYOUTS
everywhere = pytest.mark.parametrize(
    ("spec", "size"),
    [(spec, size) for spec in ALL for size in SIZES if not (size == "tiles" and spec.startswith("globalcom2"))],
)


def sized(spec: str, keep: float) -> Compressor:
    """`spec` with `keep`; the default for `none`."""
    return parse(spec if spec == "none" else f"{spec}{',' if ':' in spec else ':'}keep={keep}")


def both(grid: tuple[int, int, int] | Layout, kind: str = "gaussian", batch: int = 2, device: str = "cpu") -> Visual:
    tokens = grid.tokens if isinstance(grid, Layout) else math.prod(grid)
    return view(
        grid, draw_features(kind, tokens, batch).to(device), draw_saliency(tokens, rows=3, batch=batch).to(device)
    )


@everywhere
def test_exactly_the_budget_ascending_and_unique(spec: str, size: str) -> None:
    for kind in ("gaussian", "few signs"):
        visual = both(SIZES[size], kind)
        for keep in [*range(1, visual.layout.tokens + 3), 0.01, 0.1, 0.5, 0.99, 1.0]:
            compressor = sized(spec, keep)
            index = compressor.select(visual).index
            assert index.shape == (2, compressor.budget(visual.layout))
            assert (index.diff(dim=1) > 0).all() and (index >= 0).all() and (index < visual.layout.tokens).all()


@everywhere
def test_everything_fits_into_everything(spec: str, size: str) -> None:
    visual = both(SIZES[size])
    for keep in (1.0,) if spec == "none" else (1.0, visual.layout.tokens, visual.layout.tokens + 1):
        assert picked(sized(spec, keep), visual) == [list(range(visual.layout.tokens))] * 2


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3, torch.nan, torch.inf])
@pytest.mark.parametrize("spec", ALL)
def test_indistinguishable_tokens(spec: str, value: float) -> None:
    """Nothing to choose by: still the budget, ascending and unique."""
    visual = view((1, 5, 7), torch.full((2, 35, 6), value), torch.full((2, 3, 35), value))
    for keep in (1, 2, 17, 34, 35):
        compressor = sized(spec, keep)
        index = compressor.select(visual).index
        assert index.shape == (2, compressor.budget(visual.layout)) and (index.diff(dim=1) > 0).all()


@pytest.mark.parametrize("spec", ["fastervlm", "vtc-cls", "divprune", "todre", "todre:objective=k-center"])
def test_ties_go_to_the_lowest_index(spec: str) -> None:
    visual = view((1, 5, 7), torch.ones(1, 35, 16), torch.full((1, 3, 35), 0.25))
    assert picked(sized(spec, 9), visual) == [list(range(9))]


@pytest.mark.parametrize(("keep", "tokens", "count"), [
    (0.5, 1, 1), (0.5, 3, 2), (0.5, 5, 3), (0.5, 7, 4), (0.25, 2, 1), (0.25, 6, 2), (0.25, 10, 3), (0.125, 4, 1),
    (0.125, 12, 2), (0.25, 576, 144), (0.1, 576, 58), (0.001, 576, 1), (1.0, 576, 576), (0.999, 576, 575),
    (1, 576, 1), (64, 576, 64), (600, 576, 576), (3, 2, 2),
])  # fmt: skip
@pytest.mark.parametrize(
    "spec", ["random", "uniform", "fastervlm", "vtc-cls", "divprune", "todre", "holitom", "globalcom2"]
)
def test_budget(spec: str, keep: float, tokens: int, count: int) -> None:
    """Halves round up, never to zero, never above the number of tokens."""
    assert sized(spec, keep).budget(layout((1, 1, tokens))) == count


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("grid", [(1, 7, 7), (3, 2, 3)])
def test_a_row_of_a_batch_equals_the_row_alone(grid: tuple[int, int, int], spec: str) -> None:
    visual = both(grid, batch=4)
    for keep in (1, 5, 0.5):
        compressor = sized(spec, keep)
        together = compressor.select(visual)
        for row in range(4):
            alone = compressor.select(view(grid, visual.features[row : row + 1], visual.saliency[row : row + 1]))
            assert torch.equal(together.index[row : row + 1], alone.index)
            assert torch.equal(
                together.apply(visual.features)[row : row + 1], alone.apply(visual.features[row : row + 1])
            )


@pytest.mark.parametrize("spec", ALL)
def test_inputs_are_left_alone_and_answers_repeat(spec: str) -> None:
    visual = both((1, 7, 7))
    features, saliency = visual.features.clone(), visual.saliency.clone()
    compressor = sized(spec, 9)
    first = compressor.select(visual).index
    compressor.select(both((1, 5, 5)))
    assert torch.equal(compressor.select(visual).index, first)
    assert torch.equal(visual.features, features) and torch.equal(visual.saliency, saliency)


@pytest.mark.parametrize("spec", ALL)
def test_only_declared_needs_are_read(spec: str) -> None:
    compressor = sized(spec, 5)
    tensors = {"features": torch.randn(1, 25, 4), "saliency": torch.rand(1, 3, 25)}
    declared = {"features": {"features"}, "saliency": {"cls", "received", "logits"}}
    loaders = {name: (lambda x=x: x) for name, x in tensors.items() if declared[name] & compressor.needs}
    compressor.select(Visual(layout((1, 5, 5)), 1, torch.device("cpu"), loaders))  # type: ignore[arg-type]


def test_the_guard_notices() -> None:
    x = torch.arange(3.0)
    for act in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 1], lambda: bool(x[0]),
                lambda: torch.tensor([1, 2]), lambda: x.masked_select(x > 1), lambda: x.unique()):  # fmt: skip
        with Watch() as seen:
            act()
        assert seen.waits


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("grid", [(1, 5, 7), (3, 2, 3)])
def test_no_host_synchronisation(grid: tuple[int, int, int], spec: str) -> None:
    visual = both(grid)
    with Watch() as seen:
        sized(spec, 5).select(visual)
    assert not seen.waits


@pytest.mark.parametrize("spec", ALL)
def test_values_are_never_looked_at(spec: str) -> None:
    """Tensors without data: `tolist`, `numpy` and branches on content all fail, sizes do not."""
    visual = both((1, 5, 7), device="meta")
    selection = sized(spec, 5).select(visual)
    assert selection.index.device.type == "meta"
    assert selection.index.shape == (2, sized(spec, 5).budget(visual.layout))


@pytest.mark.parametrize("spec", ALL)
def test_a_callers_autocast_changes_nothing(spec: str) -> None:
    visual = both((1, 7, 7), "alike")
    for keep in (1, 17):
        expected = sized(spec, keep).select(visual).index
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(sized(spec, keep).select(visual).index, expected)


@pytest.mark.parametrize("spec", ALL)
def test_gradients_stay_out_of_the_choice(spec: str) -> None:
    visual = both((1, 5, 5))
    visual.features.requires_grad_()
    selection = sized(spec, 5).select(visual)
    assert not selection.index.requires_grad
    assert torch.autograd.grad(selection.apply(visual.features).sum(), visual.features)[0].any()


@pytest.mark.parametrize("spec", ALL)
def test_size_of_memory(spec: str) -> None:
    """No tensor of tokens x tokens at a length where that would matter."""
    tokens = 6000
    visual = view((1, 100, 60), torch.empty(1, tokens, 8, device="meta"), torch.empty(1, 3, tokens, device="meta"))
    with Watch() as seen:
        sized(spec, 3).select(visual)
    assert 0 < seen.largest <= tokens * 512


@pytest.mark.parametrize("name", available())
def test_every_strategy_documents_itself(name: str) -> None:
    cls = strategy(name)
    assert cls.name == name
    assert cls.__doc__ and not cls.__doc__.startswith(cls.__name__ + "("), (
        "a dataclass without a docstring gets a signature"
    )
    assert len(cls.__doc__.splitlines()[0]) <= 120 and cls.__doc__.splitlines()[0].endswith(".")
    if cls.paper:
        assert f"arXiv {cls.paper}" in cls.__doc__


def test_positions_default_to_what_the_codes_before_the_language_model_do() -> None:
    for name in ("fastervlm", "vtc-cls", "divprune", "todre", "random", "uniform", "pool", "holitom", "globalcom2"):
        assert strategy(name)().positions == "contiguous"
        assert strategy(name)(positions="original").positions == "original"
        assert strategy(name).site == "input"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("spec", ALL)
def test_a_gpu_chooses_the_same_without_waiting(spec: str) -> None:
    here, there = both((1, 12, 12)), both((1, 12, 12), device="cuda")
    expected = sized(spec, 50).select(here)
    mode = torch.cuda.get_sync_debug_mode()
    there.features, there.saliency  # noqa: B018 - loaded before the watch starts
    torch.cuda.set_sync_debug_mode("error")
    try:
        selection: Selection = sized(spec, 50).select(there)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.equal(selection.index.cpu(), expected.index)


@pytest.mark.parametrize("keep", [1, 2, 5, 9, 12, 15])
@pytest.mark.parametrize("seed", range(4))
def test_divprune_with_copies_of_a_separator(keep: int, seed: int) -> None:
    """As the formula has it, with a distance of zero between copies, however their dot products are rounded."""
    layout = Layout(4 + 3 * 4, (View(0, 2, 2), View(4, 3, 3, separators=1)))
    rows = torch.randn(2, 16, 7, generator=torch.Generator().manual_seed(seed))
    rows[:, [7, 11, 15]] = rows[:, [7]]
    visual = Visual(layout, 2, rows.device, {"features": lambda: rows}, keep)
    kept = parse(f"divprune:keep={keep}").select(visual).index
    for features, found in zip(rows.double(), kept.tolist(), strict=True):
        unit_rows = features / features.norm(dim=1, keepdim=True)
        distance = 1 - unit_rows @ unit_rows.T
        for a, b in itertools.product((7, 11, 15), repeat=2):
            distance[a, b] = 0
        nearest = distance.clone().fill_diagonal_(9).min(1).values
        chosen = [int(nearest.argmax())]
        while len(chosen) < keep:
            left = [i for i in range(16) if i not in chosen]
            chosen.append(max(left, key=lambda i: (float(distance[i, chosen].min()), -i)))
        assert sorted(chosen) == found
