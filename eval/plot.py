"""Accuracy against cost, as a picture; of a run that asked nothing, time against cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from vtc.eval.table import Row, groups, label, visual_tokens

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREYS = ("#333333", "#666666", "#888888", "#A6A6A6")
BASELINES = ("random", "uniform", "pool", "downsample")


@dataclass(frozen=True)
class Scale:
    """What is drawn upwards."""

    title: str
    of: Callable[[Row], float]
    bar: Callable[[Sequence[Row]], tuple[float, float]]  # how far the bar of a group reaches below and above it
    front: bool  # whether more is better, so that there is a Pareto front


def scale_of(rows: Sequence[Row]) -> tuple[Scale, list[Row]] | None:
    """What there is to draw, and the rows that have it: accuracy, else time to first token; `None` without either."""
    for key, scale in (("accuracy", ACCURACY), ("ttft_ms", TIME)):
        measured = [row for row in rows if row[key] is not None]
        if any(row["strategy"] != "blind" for row in measured):
            return scale, measured
    return None


def pareto(rows: Sequence[Row], path: Path) -> bool:
    """Save accuracy over visual tokens kept, and over prefill FLOPs, as a PNG; without accuracy, time to first token.

    Bars are the 95 % intervals; of several seeds, the standard deviation; of a time, half the distance of its quartiles
    to either side. The pale steps are the Pareto front: the best accuracy to be had at a cost.

    Returns:
        Whether there was anything to draw. If not, there is no file.
    """
    found = scale_of(rows)
    if found is None:
        return False
    scale, rows = found
    # Not pyplot: it would keep state and look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[tuple[str, str, Callable[[Row], float]]] = [
        ("visual tokens kept", "{:.0f}", visual_tokens),
        ("prefill FLOPs, relative to all tokens", "{:.2f}", lambda row: row["prefill_flops_ratio"]),
    ]
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, (title, form, cost) in zip((left, right), panels, strict=True):
        _panel(axes, rows, cost, scale)
        axes.set_xlabel(title)
        axes.set_xscale("log")
        ticks = _ticks(rows, cost)
        axes.set_xticks(ticks, [form.format(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel(scale.title)
    first = rows[0]
    figure.suptitle(f"{first['model']}, {first.get('prompt') or str(first['n']) + ' questions'}", fontsize=11)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    return True


def _panel(axes: Any, rows: Sequence[Row], cost: Callable[[Row], float], scale: Scale) -> None:
    if scale.front:
        look = {"color": "#F0E442", "linewidth": 7, "alpha": 0.5, "label": "Pareto front"}
        axes.step(*zip(*_front(rows, cost), strict=True), where="post", **look)
    curves: dict[str, list[list[Row]]] = {}
    for group in groups(rows):
        curves.setdefault(label(group[0]["spec"]), []).append(group)
    for name, style, text in (("none", "-", "all tokens"), ("blind", ":", "no picture (blind)")):
        if name in curves:
            row = curves.pop(name)[0][0]
            axes.axhline(scale.of(row), color="black", linestyle=style, linewidth=1, label=text)
            if name == "none":
                axes.plot(cost(row), scale.of(row), "*", color="black", markersize=9)
    greys, colours = 0, 0
    # Baselines last in the legend; the sort is stable.
    for name, points in sorted(curves.items(), key=lambda item: item[1][0][0]["strategy"] in BASELINES):
        points.sort(key=lambda group: cost(group[0]))
        if points[0][0]["strategy"] in BASELINES:
            look = {"color": GREYS[greys % len(GREYS)], "linestyle": "--", "marker": MARKERS[greys % 7]}
            greys += 1
        else:
            # Beyond seven curves the colours return with another line.
            line = ("-", "-.", (0, (1, 1)))[colours // 7 % 3]
            look = {"color": COLOURS[colours % 7], "linestyle": line, "marker": MARKERS[colours % 7]}
            colours += 1
        # Curves that share a budget are moved apart a little, so that their bars can be told from each other.
        shift = 1.012 ** (greys + colours - 1 - (len(curves) - 1) / 2)
        middle = [mean(scale.of(row) for row in group) for group in points]
        below, above = zip(*(scale.bar(group) for group in points), strict=True)
        several = f" ({len(points[0])} seeds)" if len(points[0]) > 1 else ""
        axes.errorbar(
            [shift * cost(group[0]) for group in points],
            middle,
            yerr=(below, above),
            label=name + several,
            markersize=5,
            linewidth=1.4,
            elinewidth=0.8,
            capsize=2,
            **look,
        )


def _front(rows: Sequence[Row], cost: Callable[[Row], float]) -> list[tuple[float, float]]:
    """(cost, accuracy in per cent) of the settings that no cheaper one beats, the cheapest first."""
    found: list[tuple[float, float]] = []
    seeing = groups([row for row in rows if row["strategy"] != "blind"])
    points = [(cost(group[0]), 100 * mean(row["accuracy"] for row in group)) for group in seeing]
    for price, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or value > found[-1][1]:
            found.append((price, value))
    dearest = max(price for price, _ in points)
    return [*found, (dearest, found[-1][1])]


def _interval(group: Sequence[Row]) -> tuple[float, float]:
    if len(group) > 1:
        spread = 100 * stdev(row["accuracy"] for row in group)
        return spread, spread
    value, (low, high) = group[0]["accuracy"], group[0]["accuracy_ci"]
    return 100 * (value - low), 100 * (high - value)


def _quartiles(group: Sequence[Row]) -> tuple[float, float]:
    spread = mean(row["ttft_iqr_ms"] for row in group) / 2
    return spread, spread


def _ticks(rows: Sequence[Row], cost: Callable[[Row], float]) -> list[float]:
    """The costs that occur, without those too close to a larger one to be labelled on a logarithmic axis."""
    found: list[float] = []
    for value in sorted({cost(row) for row in rows if cost(row) > 0 and row["strategy"] != "blind"}, reverse=True):
        if not found or value < 0.85 * found[-1]:
            found.append(value)
    return found


ACCURACY = Scale("accuracy, %", lambda row: 100 * row["accuracy"], _interval, front=True)
TIME = Scale("time to first token, ms", lambda row: row["ttft_ms"], _quartiles, front=False)
