"""What the card of each bundled model tells, and the tables it tells it in. The words around them are in `cards/`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Literal

import torch

from training import tiny_llava_next
from training.gauges import Foreground, InLine, LeastAttended, Part, Shown
from vtc.compressor import Compressor, as_compressors
from vtc.eval.clips import MOVING_TYPES, STILL_TYPES
from vtc.eval.items import Item
from vtc.eval.plan import DOWNSAMPLE, SEEDS, Setting

NONE, BLIND = Setting("none"), Setting("blind")


@dataclass(frozen=True)
class Result:
    """What came of the questions under one setting.

    Attributes:
        right: which are answered right, in their order.
        tokens: visual tokens of a prompt before any are dropped, on average.
        precision: share of the kept tokens that show a thing, on average over the media.
        coverage: share of the things of which a token is kept, likewise. Both `None` where that is not known.
    """

    right: list[bool]
    tokens: float
    precision: float | None = None
    coverage: float | None = None

    def first(self, count: int) -> Result:
        """The same for the first questions; `tokens` stays that of all."""
        return replace(self, right=self.right[:count])


Results = Mapping[str, Result]  # by the spec of the setting


@dataclass(frozen=True)
class Card:
    """What is measured of a bundled model, beside all tokens and none.

    Attributes:
        keeps: the budgets of the curve.
        strategies: its lines.
        by_type: what of it is also told by type of question.
        few: it is about so many questions, the first of the test set; about all of them by default.
        contiguous: budgets for which it is drawn again with survivors numbered without gaps.
        parts: settings for the whole test set.
        groups: types of questions whose accuracy is told together.
        shown: which thing each token shows.
    """

    keeps: tuple[float, ...]
    strategies: tuple[str | Compressor, ...]
    by_type: tuple[tuple[str, float], ...]
    few: int | None = None
    contiguous: tuple[float, ...] = ()
    parts: tuple[Setting, ...] = ()
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shown: Shown | None = None

    def whole(self) -> list[Setting]:
        """The settings for the whole test set."""
        return [NONE, BLIND, *self.parts]

    def curve(self) -> list[Setting]:
        """The settings for the questions of the curve."""
        budgets = [("original", keep) for keep in self.keeps] + [("contiguous", keep) for keep in self.contiguous]
        return [
            one for line in self.strategies for positions, keep in budgets for one in settings(line, keep, positions)
        ]


def _scene(item: Item) -> torch.Tensor:
    return torch.from_numpy(item.scene.owner.ravel())


def _poster(item: Item) -> torch.Tensor:
    patches = torch.from_numpy(tiny_llava_next.owners(item.scene)[0]).flatten()
    newline = patches.new_zeros(1)
    return torch.cat([patches, newline])[tiny_llava_next.layout(*item.scene.image.shape[:2]).order]


RECEIVED = ("fastervlm:saliency=received", "todre:pivot=received")  # for towers without [CLS]
BASELINES = ("random", "uniform", "pool")

CARDS = {
    "tiny-llava": Card(
        keeps=(0.5, 0.25, 0.11, 0.05, 0.02),
        strategies=("fastervlm", "divprune", "todre", *BASELINES, Foreground(), LeastAttended()),
        by_type=tuple((name, keep) for keep in (0.5, 0.11) for name in ("fastervlm", "divprune", "random")),
        shown=_scene,
    ),
    "tiny-llava-next": Card(
        keeps=(0.5, 0.25, 0.11, 0.05, 0.02),
        strategies=(
            *("divprune", "fastervlm", "globalcom2", "globalcom2:formula=code", "globalcom2:formula=zscore", "todre"),
            *(*BASELINES, Foreground(), LeastAttended()),
        ),
        by_type=tuple((name, keep) for keep in (0.25, 0.05) for name in ("globalcom2", "divprune", "random")),
        parts=tuple(Setting(part, (Part(part=part),)) for part in ("thumbnail", "crops")),
        shown=_poster,
    ),
    "tiny-onevision": Card(
        keeps=(0.5, 0.25, 0.1, 0.05, 0.025),
        strategies=("holitom", *RECEIVED, "divprune", "fastv", *BASELINES),
        by_type=tuple(
            (name, keep) for keep in (0.25, 0.05) for name in ("holitom", RECEIVED[0], "divprune", "uniform", "random")
        ),
        few=500,
        contiguous=(0.25, 0.05),
        groups={"**in time**": MOVING_TYPES, "**not in time**": STILL_TYPES},
    ),
    "tiny-qwen2vl": Card(
        keeps=(0.5, 0.25, 0.11, 0.05),
        strategies=(*RECEIVED, "divprune", "holitom", "fastv", *BASELINES, DOWNSAMPLE),
        by_type=tuple((name, keep) for keep in (0.25, 0.11) for name in ("divprune", "fastv", "random", DOWNSAMPLE)),
        few=1000,
        parts=(InLine(),),
    ),
}


def settings(line: str | Compressor, keep: float, positions: Literal["original", "contiguous"]) -> list[Setting]:
    """What a line of the curve is at one budget: one setting, and of `random` one per seed."""
    if line == DOWNSAMPLE:
        return [Setting(DOWNSAMPLE, scaled=keep)]
    one = replace(as_compressors(line)[0], keep=keep, positions=positions)
    seeds = [replace(one, seed=seed) for seed in range(SEEDS)] if one.name == "random" else [one]
    return [Setting(seed.name, (seed,)) for seed in seeds]


# --------------------------------------------------------------------------------------------------------------- tables


def percent(right: Iterable[bool]) -> str:
    return f"{100 * mean(right):.1f}"


def error(right: Sequence[bool]) -> str:
    """The standard error of the share of right answers, in per cent."""
    share = mean(right)
    return f"{100 * (share * (1 - share) / len(right)) ** 0.5:.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def curve(card: Card, found: Results, positions: Literal["original", "contiguous"] = "original") -> str:
    """Accuracy in per cent by strategy and budget; several seeds as mean and range."""
    keeps = card.keeps if positions == "original" else card.contiguous
    rows = []
    for line in card.strategies:
        cells = []
        for keep in keeps:
            shares = [100 * mean(found[one.spec].right) for one in settings(line, keep, positions)]
            spread = f" ({min(shares):.1f}-{max(shares):.1f})" if len(shares) > 1 else ""
            cells.append(f"{mean(shares):.1f}{spread}")
        rows.append([_label(line) + (f", {SEEDS} seeds: mean (range)" if line == "random" else ""), *cells])
    return table(["kept", *map(_kept, keeps)], rows)


def sight(card: Card, found: Results) -> str:
    """Precision and coverage, in per cent."""
    rows = []
    for line in card.strategies:
        seen = [[found[one.spec] for one in settings(line, keep, "original")] for keep in card.keeps]
        if seen[0][0].precision is not None:
            pairs = (
                [100 * mean(getattr(one, name) for one in some) for name in ("precision", "coverage")] for some in seen
            )
            rows.append([_label(line), *(f"{precision:.0f} / {coverage:.0f}" for precision, coverage in pairs)])
    return table(["precision / coverage", *map(_kept, card.keeps)], rows)


def types(card: Card, items: Sequence[Item], columns: Mapping[str, Sequence[Result]]) -> str:
    """Accuracy in per cent by type of question, of a group of types, and of all; a column with several seeds has their
    mean."""
    kinds = {item.type: (item.type,) for item in items} | card.groups
    rows = []
    for name, group in (*kinds.items(), ("all", kinds)):
        mine = [row for row, item in enumerate(items) if item.type in group]
        if mine:
            shares = (percent(result.right[row] for result in column for row in mine) for column in columns.values())
            rows.append([name, str(len(mine)), *shares])
    return table(["type", "questions", *columns], rows)


def chosen(card: Card, items: Sequence[Item], everything: Result, found: Results) -> str:
    """The table by type of question for a part of the curve."""
    columns = {"all tokens": [everything]}
    for line, keep in card.by_type:
        columns[f"{_label(line)}, {_kept(keep)}"] = [found[one.spec] for one in settings(line, keep, "original")]
    return types(card, items, columns)


def _kept(keep: float) -> str:
    return f"{100 * keep:g} %"


def _label(line: str | Compressor) -> str:
    return f"`{line}`" if isinstance(line, str) else line.name
