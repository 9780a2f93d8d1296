"""Two runs of the same questions, setting by setting: what changed, and whether it is more than noise.

Both runs answered the same questions, so what tells them apart are the questions that only one of them got right. Under
chance each such question falls to either run with probability one half (McNemar's test; here the exact binomial one).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vtc.errors import VtcError
from vtc.eval.accuracy import wilson

LEVEL = 0.05  # of the test, for all settings together
CONDITIONS = ("model", "task", "prompt", "n", "device", "dtype", "attention", "threads", "flops_convention")

Row = dict[str, Any]
Sample = dict[str, Any]


@dataclass(frozen=True)
class Pairs:
    """How two runs did on the same questions: the four counts of right and wrong."""

    both: int  # right in both
    lost: int  # right in the first run only
    gained: int  # right in the second run only
    neither: int
    other_words: int = 0  # questions whose answer is not the same, right or wrong

    @property
    def n(self) -> int:
        return self.both + self.lost + self.gained + self.neither

    @property
    def difference(self) -> float:
        """Accuracy of the second run less that of the first."""
        return (self.gained - self.lost) / self.n

    @property
    def p(self) -> float:
        """The exact two-sided p-value of McNemar's test."""
        return mcnemar(self.lost, self.gained)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference: Newcombe's tenth method for paired proportions (Newcombe 1998).

        It joins the Wilson intervals of both accuracies, narrowed by how much the runs go together (`phi`).
        """
        first, second = self.both + self.lost, self.both + self.gained
        p, q = first / self.n, second / self.n
        (p_low, p_high), (q_low, q_high) = wilson(first, self.n), wilson(second, self.n)
        phi = self._phi()
        below = (q - q_low) ** 2 - 2 * phi * (q - q_low) * (p_high - p) + (p_high - p) ** 2
        above = (q_high - q) ** 2 - 2 * phi * (q_high - q) * (p - p_low) + (p - p_low) ** 2
        return self.difference - math.sqrt(max(0.0, below)), self.difference + math.sqrt(max(0.0, above))

    def _phi(self) -> float:
        """Correlation of the two runs, with Newcombe's continuity correction where it is positive."""
        first, second = self.both + self.lost, self.both + self.gained
        product = first * (self.n - first) * second * (self.n - second)
        if product == 0:
            return 0.0
        cross = float(self.both * self.neither - self.lost * self.gained)
        if cross > 0:
            cross = max(cross - self.n / 2, 0.0)
        return cross / math.sqrt(product)


@dataclass(frozen=True)
class Change:
    """One setting that both runs have."""

    first: Row
    second: Row
    pairs: Pairs | None  # None where a run lacks its samples, or no question is in both
    p: float | None  # by Holm's method for all settings of the comparison
    verdict: str

    @property
    def name(self) -> str:
        """The spec, or both where they differ."""
        return " → ".join(dict.fromkeys((self.first["spec"], self.second["spec"])))


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common and what not."""

    changes: tuple[Change, ...]
    only_first: tuple[str, ...]  # settings
    only_second: tuple[str, ...]
    conditions: tuple[str, ...]  # what else differs between the runs, in words


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p-value: how likely chance splits `lost + gained` questions at least as unevenly."""
    total, fewer = lost + gained, min(lost, gained)
    return min(1.0, 2 * sum(math.comb(total, k) for k in range(fewer + 1)) / 2**total)


def holm(values: Sequence[float]) -> list[float]:
    """p-values by Holm's method: the chance of one false alarm among all of them stays below the level."""
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted = [0.0] * len(values)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted


def pair(first: dict[str, Sample], second: dict[str, Sample]) -> Pairs | None:
    """The questions that are in both runs, of one setting, by id; `None` if there is none.

    Raises:
        VtcError: an id stands for different questions in the two runs.
    """
    counts = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    other = 0
    for key in first.keys() & second.keys():
        one, two = first[key], second[key]
        for what in ("question", "expected"):
            if one[what] != two[what]:
                raise VtcError(
                    f"question {key} is not the same in the two runs: {what} {one[what]!r} and {two[what]!r}; "
                    "only runs of the same questions can be compared"
                )
        counts[one["right"], two["right"]] += 1
        other += one["answer"] != two["answer"]
    pairs = Pairs(counts[True, True], counts[True, False], counts[False, True], counts[False, False], other)
    return pairs if pairs.n else None


def compare(
    first: Sequence[Row],
    second: Sequence[Row],
    first_samples: dict[str, dict[str, Sample]],
    second_samples: dict[str, dict[str, Sample]],
) -> Comparison:
    """Compare two runs: their rows, and per spec their samples by id (empty if a run has none)."""
    shared = match(first, second)
    paired = [pair(first_samples.get(one["spec"], {}), second_samples.get(two["spec"], {})) for one, two in shared]
    adjusted = iter(holm([pairs.p for pairs in paired if pairs is not None]))
    values = [None if pairs is None else next(adjusted) for pairs in paired]
    return Comparison(
        tuple(
            Change(one, two, pairs, p, _verdict(pairs, p))
            for (one, two), pairs, p in zip(shared, paired, values, strict=True)
        ),
        _others(first, [one for one, _ in shared]),
        _others(second, [two for _, two in shared]),
        tuple(conditions_changed(first[0], second[0], CONDITIONS)),
    )


def match(first: Sequence[Row], second: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The settings of both runs: the same spec, or else the only ones of their strategy, `keep` and `seed`."""
    same = {row["spec"]: row for row in second}
    pairs = {row["spec"]: (row, same[row["spec"]]) for row in first if row["spec"] in same}
    alike: list[dict[str, list[Row]]] = [{}, {}]
    for found, rows in zip(alike, (first, second), strict=True):
        for row in rows:
            if row["spec"] not in pairs:
                found.setdefault(repr((row["strategy"], row["keep"], row["seed"])), []).append(row)
    for key, ones in alike[0].items():
        twos = alike[1].get(key, [])
        if len(ones) == len(twos) == 1:
            pairs[ones[0]["spec"]] = ones[0], twos[0]
    return [pairs[row["spec"]] for row in first if row["spec"] in pairs]


def _others(rows: Sequence[Row], matched: Sequence[Row]) -> tuple[str, ...]:
    specs = {row["spec"] for row in matched}
    return tuple(row["spec"] for row in rows if row["spec"] not in specs)


def _verdict(pairs: Pairs | None, p: float | None) -> str:
    if pairs is None or p is None:
        return "not paired"
    if pairs.lost == pairs.gained == 0:
        return "other wrong answers" if pairs.other_words else "same answers"
    if p >= LEVEL:
        return "noise" if pairs.p >= LEVEL else "unclear"
    return "changed: better" if pairs.gained > pairs.lost else "changed: worse"


def conditions_changed(first: Row, second: Row, names: Sequence[str]) -> list[str]:
    """What differs in how two runs were made: these names, and the versions."""
    pairs = [(name, first.get(name), second.get(name)) for name in names]
    versions = dict.fromkeys([*first["versions"], *second["versions"]])
    pairs += [(name, first["versions"].get(name), second["versions"].get(name)) for name in versions]
    return [f"{name}: {before} → {after}" for name, before, after in pairs if before != after]
