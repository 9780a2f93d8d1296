"""GlobalCom2 against plain loops in float64, written from the paper's formulas and the rules of its code."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vtc.compressor import parse, strategy
from vtc.errors import SpecError, UnsupportedModelError
from vtc.strategies.globalcom2 import crops
from vtc.visual import Encoder, Layout, View, Visual
from watch import Watch

Numbers = list[float]


def picture(thumbnail: tuple[int, int], rows: int, columns: int, newline: int = 1, **canvas: Any) -> Layout:
    """A thumbnail and a canvas."""
    start = thumbnail[0] * thumbnail[1]
    views = View(0, *thumbnail), View(start, rows, columns, newline, **canvas)
    return Layout(views[1].stop, views)


IMAGES = {
    "2x2": picture((4, 4), 8, 8, crops=(2, 2)),
    "1x3": picture((4, 4), 4, 12, crops=(1, 3)),
    "without newlines": picture((3, 3), 6, 6, newline=0, crops=(2, 2)),
    "padded above and below": picture((5, 5), 6, 10, crops=(2, 2), box=(0.2, 0.0, 0.8, 1.0)),
    "padded left and right, 3x1": picture((3, 3), 9, 1, crops=(3, 1), box=(0.0, 1 / 3, 1.0, 2 / 3)),
    "scaled down to odd sizes": picture((5, 4), 7, 5, crops=(3, 2)),
    "a crop that is all padding": picture((4, 4), 3, 4, crops=(2, 1), box=(0.6, 0.0, 1.0, 1.0)),
    "one crop": picture((3, 3), 3, 3, crops=(1, 1)),
}
DYADIC = ["2x2", "without newlines", "padded above and below", "one crop"]  # weights of resizing are exact in float32
FORMULAS = ["paper", "code", "zscore"]


def look(sizes: Layout, score: Tensor | None = None, x: Tensor | None = None) -> Visual:
    """`score` `(B, N)`, `x` `(B, N, D)`."""
    loaders = {} if score is None else {"saliency": lambda: score[:, None]}
    given = x if x is not None else score
    assert given is not None
    return Visual(sizes, len(given), given.device, loaders | ({} if x is None else {"features": lambda: x}))  # type: ignore[arg-type]


def draw(tokens: int, kind: str, batch: int = 2) -> Tensor:
    """`(B, N)`: probabilities, or dot products, or few levels of either, which make ties."""
    random = torch.Generator().manual_seed(tokens)
    if kind == "ties":
        return torch.randint(0, 3, (batch, tokens), generator=random) / 4
    score = torch.randn(batch, tokens, generator=random) * 2
    return score.softmax(1) * 2 if kind == "probabilities" else score


# The reference


def resized(score: Numbers, size: tuple[int, int], rows: int, columns: int) -> Numbers:
    """Bilinear, with the corners of the pictures aligned, not those of their corner cells."""

    def between(i: int, small: int, large: int) -> tuple[int, int, float]:
        at = max((i + 0.5) * small / large - 0.5, 0.0)
        low = math.floor(at)
        return low, min(low + 1, small - 1), at - low

    out = []
    for i, j in itertools.product(range(rows), range(columns)):
        y0, y1, v = between(i, size[0], rows)
        x0, x1, u = between(j, size[1], columns)
        cell = [[score[y * size[1] + x] for x in (x0, x1)] for y in (y0, y1)]
        out.append((1 - v) * ((1 - u) * cell[0][0] + u * cell[0][1]) + v * ((1 - u) * cell[1][0] + u * cell[1][1]))
    return out


def crop_of(canvas: View, i: int, j: int, rows: int, columns: int) -> int:
    """Which crop the middle of cell (i, j) of `rows` x `columns` is in."""
    top, left, bottom, right = canvas.box
    y, x = top + (bottom - top) * (i + 0.5) / rows, left + (right - left) * (j + 0.5) / columns
    return math.floor(y * canvas.crops[0]) * canvas.crops[1] + math.floor(x * canvas.crops[1])


def best(score: Numbers, k: int) -> list[int]:
    return sorted(range(len(score)), key=lambda i: (-score[i], i))[:k]


def minus_cosines(x: Tensor, center: Tensor) -> Numbers:
    return [-float(row @ center / (row.norm() * center.norm())) for row in x.double()]


def ratios(richness: dict[int, float], formula: str, tau: float, keep: float) -> dict[int, float]:
    """By crop."""
    n, mean = len(richness), sum(richness.values()) / len(richness)
    if formula == "zscore":
        spread = math.sqrt(sum((value - mean) ** 2 for value in richness.values()) / n)
        richness = {j: (value - mean) / spread if spread > 1e-9 else 0.0 for j, value in richness.items()}
    highest = max(richness.values())
    powers = {j: math.exp((value - highest) / tau) for j, value in richness.items()}
    sigma = {j: power / sum(powers.values()) for j, power in powers.items()}
    found = {j: keep * (1 + sigma[j] - 1 / n) for j in sigma}
    return {j: min(1.0, r) for j, r in found.items()} if formula == "code" else found


def dealt(shares: dict[int, float], sizes: dict[int, int], kept: int) -> dict[int, int]:
    """One token at a time, to the crop that has the largest share for each half-token it would be at."""
    counts = dict.fromkeys(shares, 0)
    for _ in range(kept):
        open_ones = [j for j in sorted(shares) if counts[j] < sizes[j]]
        # to nine digits: equal shares of float64 sums should stay equal
        winner = max(open_ones, key=lambda j: (round(shares[j] / (2 * counts[j] + 1), 9), -j))
        counts[winner] += 1
    return counts


def within_crops(
    richness: dict[int, float], scene: Numbers, own: Numbers, crop: list[int], kept: int, formula: str, alpha: float,
    tau: float,
) -> list[int]:  # fmt: skip
    members = {j: [i for i in range(len(crop)) if crop[i] == j] for j in sorted(set(crop))}
    shares = ratios({j: richness.get(j, 0.0) for j in members}, formula, tau, kept / len(crop))
    sizes = {j: len(tokens) for j, tokens in members.items()}
    counts = dealt({j: shares[j] * sizes[j] for j in members}, sizes, kept)
    found = []
    for j, tokens in members.items():
        if formula == "code":
            lengths = [math.sqrt(sum(score[i] ** 2 for i in tokens)) or 1.0 for score in (scene, own)]
            score = [scene[i] / lengths[0] + own[i] / lengths[1] for i in tokens]
        else:
            score = [alpha * scene[i] + (1 - alpha) * own[i] for i in tokens]
        score = [round(value, 7) for value in score]  # ties of float32 are ties here
        found += [tokens[i] for i in best(score, counts[j])]
    return found


def reference(
    sizes: Layout, score: Tensor, k: int, formula: str, alpha: float = 0.5, tau: float | None = None,
    x: Tensor | None = None,
) -> list[int]:  # fmt: skip
    """`score` `(N,)`; with `x` `(N, D)`, the score is minus the cosine with the mean of the view."""
    thumbnail, canvas = sizes.views
    cells = thumbnail.places() + canvas.places()
    n0 = thumbnail.rows * thumbnail.columns
    kept = min(k, len(cells))
    first = math.floor(kept * n0 / len(cells) + 0.5)
    grid = itertools.product(range(canvas.rows), range(canvas.columns))
    crop = [crop_of(canvas, i, j, canvas.rows, canvas.columns) for i, j in grid]
    whole, own = score[thumbnail.places()].double().tolist(), score[canvas.places()].double().tolist()
    if x is not None:
        outer, inner = x[thumbnail.places()].double(), x[canvas.places()].double()
        whole = minus_cosines(outer, outer.mean(0))
        mean = {j: inner[[i for i in range(len(crop)) if crop[i] == j]].mean(0) for j in set(crop)}
        own = [minus_cosines(inner[i : i + 1], mean[j])[0] for i, j in enumerate(crop)]
    richness: dict[int, float] = {}
    for i, j in itertools.product(range(thumbnail.rows), range(thumbnail.columns)):
        where = crop_of(canvas, i, j, thumbnail.rows, thumbnail.columns)
        richness[where] = richness.get(where, 0.0) + whole[i * thumbnail.columns + j]
    scene = resized(whole, (thumbnail.rows, thumbnail.columns), canvas.rows, canvas.columns)
    tau = tau or (1.0 if formula == "zscore" else 10.0)
    inside = within_crops(richness, scene, own, crop, kept - first, formula, alpha, tau)
    places = [cells[i] for i in best(whole, first)] + [cells[n0 + i] for i in inside]
    newlines = [place for place in range(sizes.tokens) if place not in cells]
    return sorted(places + newlines[: k - kept])


# Parity


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize(
    ("name", "kind"),
    [*itertools.product(IMAGES, ["probabilities", "dot products"]), *itertools.product(DYADIC, ["ties"])],
)
def test_every_budget(name: str, kind: str, formula: str) -> None:
    sizes = IMAGES[name]
    score = draw(sizes.tokens, kind)
    for k in [*range(1, sizes.tokens, 3), sizes.tokens]:
        for saliency in ("cls", "received"):
            selection = strategy("globalcom2")(keep=k, formula=formula, saliency=saliency).select(look(sizes, score))
            assert selection.index.tolist() == [reference(sizes, row, k, formula) for row in score]


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("sizes", IMAGES.values(), ids=IMAGES)
def test_without_a_class_token(sizes: Layout, formula: str) -> None:
    x = torch.randn(2, sizes.tokens, 8, generator=torch.Generator().manual_seed(sizes.tokens))
    for k in range(1, sizes.tokens, 5):
        compressor = strategy("globalcom2")(keep=k, formula=formula, saliency="mean")
        expected = [reference(sizes, torch.zeros(sizes.tokens), k, formula, x=row) for row in x]
        assert compressor.select(look(sizes, x=x)).index.tolist() == expected


@pytest.mark.parametrize(("alpha", "tau"), [(0.0, None), (1.0, 5.0), (0.3, 0.1)])
def test_every_parameter(alpha: float, tau: float | None) -> None:
    sizes = IMAGES["padded above and below"]
    score = draw(sizes.tokens, "dot products")
    for formula, k in itertools.product(FORMULAS, (10, 33, 60)):
        selection = strategy("globalcom2")(keep=k, formula=formula, alpha=alpha, tau=tau).select(look(sizes, score))
        assert selection.index.tolist() == [reference(sizes, row, k, formula, alpha, tau) for row in score]


@pytest.mark.parametrize("saliency", ["cls", "mean"])
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("separators", [0, 1])
def test_clips(separators: int, formula: str, saliency: str) -> None:
    frames, places = 4, 6
    sizes = Layout.frames(frames, 2, 3, separators)
    score = draw(sizes.tokens, "dot products")
    x = torch.randn(2, sizes.tokens, 8, generator=torch.Generator().manual_seed(1))
    crop = [i // places for i in range(frames * places)]
    for k in range(1, sizes.tokens + 1, 4):
        expected = []
        for row in range(2):
            own = score[row, :24].double().tolist()
            scene = [sum(own[i % places :: places]) / frames for i in range(24)]
            if saliency == "mean":
                clip = x[row, :24].double()
                scene = minus_cosines(clip, clip.mean(0))
                own = [
                    minus_cosines(clip[i : i + 1], clip[crop[i] * 6 : crop[i] * 6 + 6].mean(0))[0] for i in range(24)
                ]
            richness = {t: sum(scene[t * places : (t + 1) * places]) for t in range(frames)}
            tau = 1.0 if formula == "zscore" else 10.0
            kept = min(k, 24)
            found = within_crops(richness, scene, own, crop, kept, formula, 0.5, tau)
            expected.append(sorted(found) + list(range(24, 24 + k - kept)))
        compressor = strategy("globalcom2")(keep=k, formula=formula, saliency=saliency)
        assert compressor.select(look(sizes, score, x)).index.tolist() == expected


# By hand


def test_a_rich_crop_keeps_more() -> None:
    """All that is salient on the thumbnail is in its upper left quarter."""
    sizes, score = IMAGES["2x2"], torch.zeros(1, IMAGES["2x2"].tokens)
    for row, column in itertools.product(range(2), range(2)):
        score[0, 4 * row + column] = 20.0
    crop = crops(sizes.views[1], 8, 8, torch.device("cpu")).tolist()
    cells = sizes.views[1].places()
    assert crop[0] == crop[27] == 0 and crop[4] == 1 and crop[32] == 2 and crop[36] == 3
    for formula in FORMULAS:
        index = strategy("globalcom2")(keep=40, formula=formula).select(look(sizes, score)).index[0].tolist()
        counts = [sum(crop[cells.index(i)] == j for i in index if i >= 16) for j in range(4)]
        assert counts[0] > max(counts[1:]) and max(counts[1:]) - min(counts[1:]) <= 1 and sum(counts) == 32
    # A half of each crop, times 1 + sigma - 1/4: sigma is 1 for the first but for e^-8, in which the rest share.
    published = strategy("globalcom2")(keep=40).select(look(sizes, score)).index[0].tolist()
    assert [sum(crop[cells.index(i)] == j for i in published if i >= 16) for j in range(4)] == [14, 6, 6, 6]


def test_probabilities_hardly_tell_crops_apart_and_scale_free_scores_do() -> None:
    """The paper's formula and its code's: the richness of probabilities differs by less than one, over tau = 10."""
    sizes, score = IMAGES["2x2"], draw(IMAGES["2x2"].tokens, "probabilities", 1)
    score[0, [0, 1, 4, 5]] += 0.2
    cells, crop = sizes.views[1].places(), crops(sizes.views[1], 8, 8, torch.device("cpu")).tolist()

    def spread(formula: str, scale: float) -> list[int]:
        index = strategy("globalcom2")(keep=40, formula=formula).select(look(sizes, score * scale)).index[0].tolist()
        return [sum(crop[cells.index(i)] == j for i in index if i >= 16) for j in range(4)]

    assert spread("paper", 1.0) == [8, 8, 8, 8] != spread("paper", 100.0)
    assert spread("zscore", 1.0) == spread("zscore", 100.0) != [8, 8, 8, 8]


def test_padding_is_no_part_of_the_thumbnail() -> None:
    """Six of ten rows of the canvas are there: the first crops own the three upper rows, and half of the thumbnail."""
    canvas = IMAGES["padded above and below"].views[1]
    device = torch.device("cpu")
    assert crops(canvas, 6, 10, device).view(6, 10)[:, 0].tolist() == [0, 0, 0, 2, 2, 2]
    assert crops(canvas, 6, 10, device).view(6, 10)[0].tolist() == [0] * 5 + [1] * 5
    assert crops(canvas, 4, 4, device).view(4, 4).tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2
    for sizes in IMAGES.values():
        view = sizes.views[1]
        for rows, columns in ((view.rows, view.columns), (3, 5)):
            expected = [crop_of(view, i, j, rows, columns) for i in range(rows) for j in range(columns)]
            assert crops(view, rows, columns, device).tolist() == expected


def test_thumbnail_survivors_are_in_raster_order() -> None:
    sizes = IMAGES["2x2"]
    score = torch.arange(sizes.tokens, 0.0, -1)[None].flip(1)  # importance rises: the code's order would be reversed
    index = strategy("globalcom2")(keep=20).select(look(sizes, score)).index
    assert (index.diff(dim=1) > 0).all() and index[0, :4].tolist() == [12, 13, 14, 15]


def test_newlines_are_the_last_to_survive() -> None:
    sizes = IMAGES["2x2"]
    newlines = [
        place for place in range(sizes.tokens) if place not in sizes.views[0].places() + sizes.views[1].places()
    ]
    score = draw(sizes.tokens, "dot products", 1)
    score[0, newlines] = 1e6
    for k in range(1, sizes.tokens + 1):
        index = strategy("globalcom2")(keep=k).select(look(sizes, score)).index[0].tolist()
        assert len(index) == k and [i for i in index if i in newlines] == newlines[: max(0, k - 80)]


@pytest.mark.parametrize("newline", [0, 1])
def test_an_image_without_crops(newline: int) -> None:
    sizes = Layout.frames(1, 2, 3, separators=newline)
    score = torch.tensor([[0.1, 0.5, 0.5, 0.2, 0.0, 0.9, 9.0]])[:, : 6 + newline]
    assert parse("globalcom2:keep=3").select(look(sizes, score)).index.tolist() == [[1, 2, 5]]
    x = torch.eye(2)[[0, 0, 1, 0, 0, 1, 0]][None, : 6 + newline]
    assert parse("globalcom2:keep=2,saliency=mean").select(look(sizes, x=x)).index.tolist() == [[2, 5]]


# What the promises ask


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("saliency", ["cls", "mean"])
def test_each_image_of_a_batch_has_its_own_mask(saliency: str, formula: str) -> None:
    sizes = IMAGES["padded above and below"]
    score, x = draw(sizes.tokens, "dot products", 4), torch.randn(4, sizes.tokens, 8)
    compressor = strategy("globalcom2")(keep=0.3, formula=formula, saliency=saliency)
    together = compressor.select(look(sizes, score, x)).index
    alone = [compressor.select(look(sizes, score[n : n + 1], x[n : n + 1])).index for n in range(4)]
    assert torch.equal(together, torch.cat(alone)) and len({tuple(row) for row in together.tolist()}) == 4


@pytest.mark.parametrize("value", [0.0, 1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("sizes", [*IMAGES.values(), Layout.frames(3, 2, 3, 1)])
def test_the_budget_survives_whatever_the_values_are(sizes: Layout, formula: str, value: float) -> None:
    score, x = torch.full((2, sizes.tokens), value), torch.full((2, sizes.tokens, 4), value)
    score[1, 3:], x[1, 3:] = 0.25, 1.0
    for saliency, k in itertools.product(("cls", "mean"), (1, 2, 7, 13, sizes.tokens - 1, sizes.tokens)):
        index = strategy("globalcom2")(keep=k, formula=formula, saliency=saliency).select(look(sizes, score, x)).index
        assert index.shape == (2, k) and (index.diff(dim=1) > 0).all() and (index >= 0).all()
        assert (index < sizes.tokens).all()


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("saliency", ["cls", "mean"])
@pytest.mark.parametrize("sizes", [IMAGES["2x2"], Layout.frames(1, 2, 3), Layout.frames(3, 2, 3, 1)], ids=str)
def test_the_device_is_not_waited_for(sizes: Layout, saliency: str, formula: str) -> None:
    compressor = strategy("globalcom2")(keep=5, formula=formula, saliency=saliency)
    score, x = torch.rand(2, sizes.tokens), torch.randn(2, sizes.tokens, 8)
    visual = look(sizes, score, x)
    with Watch() as seen:
        compressor.select(visual)
    assert not seen.waits
    assert compressor.select(look(sizes, score.to("meta"), x.to("meta"))).index.shape == (2, 5)


def test_a_callers_autocast_changes_nothing() -> None:
    sizes = IMAGES["2x2"]
    visual = look(sizes, draw(sizes.tokens, "probabilities"), torch.randn(2, sizes.tokens, 8))
    for options in itertools.product(FORMULAS, ("cls", "mean")):
        compressor = strategy("globalcom2")(keep=20, formula=options[0], saliency=options[1])
        expected = compressor.select(visual).index
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(compressor.select(visual).index, expected)


def test_tiles_without_places_and_frames_of_several_sizes_are_refused() -> None:
    for count in (2, 3):
        tiles = Layout(9 * count, tuple(View(9 * n, 3, 3) for n in range(count)))
        with pytest.raises(UnsupportedModelError, match=f"{count} views whose places .* are not known; 'fastervlm'"):
            parse("globalcom2:keep=3").select(look(tiles, torch.rand(1, 9 * count)))
    uneven = Layout(13, (View(0, 3, 3), View(9, 2, 2)), clip=True)
    with pytest.raises(UnsupportedModelError, match="must be of one size"):
        parse("globalcom2:keep=3").select(look(uneven, torch.rand(1, 13)))


def test_spec() -> None:
    compressor = parse("globalcom2")
    assert (compressor.keep, compressor.positions) == (0.25, "contiguous")
    assert parse("globalcom2").needs == parse("globalcom2:formula=zscore").needs == {"cls"}
    assert parse("globalcom2:formula=code").needs == {"logits"}
    assert parse("globalcom2:saliency=received,formula=code").needs == {"received"}
    assert parse("globalcom2:saliency=mean,formula=code").needs == {"features"}
    assert compressor.layers(Encoder(depth=24, feature_layer=22, class_token=True)) == (23,)
    assert str(parse("globalcom2:keep=9,tau=5.0,formula=code")) == "globalcom2:keep=9,formula=code,tau=5.0"


@pytest.mark.parametrize("options", ["alpha=1.1", "alpha=-1", "tau=0", "tau=-1", "tau=inf", "tau=nan"])
def test_parameters_out_of_range(options: str) -> None:
    with pytest.raises(SpecError, match=options.partition("=")[0] + "="):
        parse(f"globalcom2:{options}")
