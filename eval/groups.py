"""Difficulty groups, after VTC-Bench (arXiv 2510.07143): which questions need more than a trivial compressor?

A reference divides the questions: the full model on a picture that was scaled down to the same number of tokens, or,
where scaling changes no number of tokens, the strategy `pool` or `uniform`. Of the questions that the full model gets
right, those that the reference gets wrong are *difficult* and the others *easy*. As in VTC-Bench's code (its text says
otherwise), questions that the full model gets wrong are in neither; they are told too, in two groups of their own. By
construction the reference itself scores 0 on the difficult group and 100 on the easy one.

Groups are made anew for each budget. So scores at two budgets are about different questions, and are no curve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev

from vtc.eval.accuracy import Score, wilson
from vtc.eval.paired import Row, Sample, pair
from vtc.eval.table import Table, amount, groups, keep_of, name_of, tokens_of, without_gaps

REFERENCES = ("downsample", "pool", "uniform")  # the first that a run has divides its questions
# Right under the full model, right under the reference.
GROUPS = {"difficult": (True, False), "easy": (True, True), "gained": (False, True), "neither": (False, False)}

Samples = Mapping[str, Mapping[str, Sample]]  # per spec, by id


@dataclass(frozen=True)
class Division:
    """The questions of a run, divided at one budget.

    Attributes:
        reference: the row of the setting that divides them.
        ids: of the questions of each group of `GROUPS`, in the order of the run.
    """

    reference: Row
    ids: Mapping[str, tuple[str, ...]]

    def scores(self, samples: Mapping[str, Sample]) -> dict[str, Score]:
        """How one setting did in each group; questions that it lacks are left out."""
        found = {}
        for name, ids in self.ids.items():
            mine = [samples[key]["right"] for key in ids if key in samples]
            found[name] = Score(sum(mine), len(mine))
        return found


def divide(rows: Sequence[Row], samples: Samples) -> list[Division]:
    """One division per budget of the reference; none if the run has no reference, or lacks the answers."""
    full = samples.get("none", {})
    for name in REFERENCES:
        settings = [row for row in rows if row["strategy"] == name and samples.get(row["spec"])]
        if full and settings:
            return [Division(row, _ids(full, samples[row["spec"]])) for row in settings]
    return []


def _ids(full: Mapping[str, Sample], reference: Mapping[str, Sample]) -> dict[str, tuple[str, ...]]:
    keys = [key for key in full if key in reference]
    return {
        name: tuple(key for key in keys if (full[key]["right"], reference[key]["right"]) == right)
        for name, right in GROUPS.items()
    }


def tables(rows: Sequence[Row], samples: Samples) -> list[Table]:
    """What became of the full model's answers, and the scores in the groups of each budget."""
    if len(samples.get("none", {})) == 0:
        return []
    found = [_table(one, rows, samples) for one in divide(rows, samples)]
    return [transitions(rows, samples), *(replace(one, notes="") for one in found[:-1]), *found[-1:]]


# -------------------------------------------------------------------------------------------------------- transitions


def transitions(rows: Sequence[Row], samples: Samples) -> Table:
    """How many answers were right or wrong under the full model and under each setting."""
    headings = (
        *("strategy", "keep", "visual tokens", "right → right", "right → wrong", "wrong → right", "wrong → wrong"),
        "of the right ones lost, %",
    )
    cells = []
    for group in groups([row for row in rows if row["strategy"] != "none"]):
        found = [pair(dict(samples["none"]), dict(samples.get(row["spec"], {}))) for row in group]
        pairs = [one for one in found if one is not None]
        if not pairs:
            continue
        counts = [mean(getattr(one, name) for one in pairs) for name in ("both", "lost", "gained", "neither")]
        lost = _share([Score(one.lost, one.both + one.lost) for one in pairs])
        cells.append((name_of(group), keep_of(group), tokens_of(group), *map(amount, counts), lost))
    return without_gaps("Right and wrong answers, full model → compressed", headings, cells, TRANSITION_NOTES)


def _share(scores: Sequence[Score]) -> str:
    """A share in per cent: one run with Wilson's interval, several seeds with their standard deviation."""
    if not scores[0].n:
        return ""
    values = [100 * score.accuracy for score in scores]
    if len(values) > 1:
        return f"{mean(values):.0f} ± {stdev(values):.0f}"
    low, high = scores[0].interval
    return f"{values[0]:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


# ------------------------------------------------------------------------------------------------------------- groups


def _table(division: Division, rows: Sequence[Row], samples: Samples) -> Table:
    reference = division.reference
    name = reference["strategy"]
    sizes = {group: len(ids) for group, ids in division.ids.items()}
    headings = (
        *("strategy", "visual tokens", f"difficult ({sizes['difficult']})", f"easy ({sizes['easy']})"),
        *(f"only {name} right ({sizes['gained']})", f"both wrong ({sizes['neither']})"),
    )
    # The blind floor belongs to every budget.
    same = [row for row in rows if row["strategy"] == "blind" or _budget(row) == _budget(reference)]
    cells = []
    for group in groups([row for row in same if row["strategy"] != "none" and samples.get(row["spec"])]):
        scores = [division.scores(samples[row["spec"]]) for row in group]
        shares = (_share([score[kind] for score in scores]) for kind in GROUPS)
        cells.append((name_of(group), tokens_of(group), *shares))
    title = f"Difficulty groups at keep {reference['keep']}, by {name}: accuracy in %, with 95 % interval"
    return without_gaps(title, headings, cells, NOTES.format(name=name))


def _budget(row: Row) -> str:
    return repr(row["keep"])  # the int 1 (one token) is not the float 1.0 (all of them)


def columns(rows: Sequence[Row], samples: Samples) -> dict[str, Row]:
    """Per spec the same numbers as plain values, for a table with one line per row."""
    full = dict(samples.get("none", {}))
    divisions = {_budget(one.reference): one for one in divide(rows, samples)}
    found: dict[str, Row] = {}
    for row in rows:
        mine = samples.get(row["spec"], {})
        pairs = pair(full, dict(mine)) if full else None
        if pairs is None:
            continue
        flat: Row = {f"transition.{name}": getattr(pairs, name) for name in ("both", "lost", "gained", "neither")}
        division = divisions.get(_budget(row))
        if division is not None and row["strategy"] not in ("none", "blind"):
            flat["groups.reference"] = division.reference["spec"]
            for name, score in division.scores(mine).items():
                low, high = wilson(score.right, score.n)
                values = {"n": score.n, "accuracy": score.accuracy if score.n else None, "low": low, "high": high}
                flat.update({f"groups.{name}.{key}": value for key, value in values.items()})
        found[row["spec"]] = flat
    return found


TRANSITION_NOTES = """
Number of questions; of several seeds, the mean. Lost: wrong under compression, as a share of what the full model gets
right, with Wilson's 95 % interval, or mean ± standard deviation over seeds.
"""
NOTES = """
Groups after VTC-Bench, and their sizes. Difficult: right with all tokens, wrong with `{name}`. Easy: right with both.
The last two are the questions that the full model gets wrong. `{name}` divides the questions, so its own line says
nothing. Groups of another budget are other questions: read down, not from table to table. Compare lines of about as
many visual tokens: they are measured, and a budget may not be met exactly. Wilson's intervals; of several seeds, mean ±
standard deviation.
"""
