"""What `vtc eval` left in a folder, as tables: scores and cost per task, and two runs compared document by document.

A document has any score its task gives it, not only right or wrong. So two runs are compared by the exact sign test on
the documents whose score fell or rose, which for right and wrong is McNemar's test, and by an interval of the mean
difference. Whether a higher score is better, only the task knows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from vtc.errors import VtcError
from vtc.eval import lines
from vtc.eval.accuracy import wilson
from vtc.eval.flops import human
from vtc.eval.lmms.run import scores_of
from vtc.eval.paired import LEVEL, Pairs, conditions_changed, holm, mcnemar
from vtc.eval.table import Table, amount, without_gaps

Row = dict[str, Any]
Z = 1.959964  # of a 95 % interval
WANTED = frozenset(["model", "spec", "tasks", "versions", "device", "dtype", "attention", "date"])


@dataclass(frozen=True)
class Evaluated:
    """One run of `vtc eval`.

    Attributes:
        name: how the user named it.
        results: the content of `results.json`.
        documents: rows of `documents.jsonl` per task, by number of the document.
    """

    name: str
    results: Row
    documents: dict[str, dict[int, Row]]

    @property
    def conditions(self) -> str:
        """How it was measured, as one line."""
        found = self.results
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        return (
            f"{found['spec']}; {found['device']}, {found['dtype']}, {found['attention']} attention; "
            f"{versions}; {found['date'][:10]}"
        )

    def scores(self) -> list[tuple[str, str]]:
        """Task and name of every score, in order."""
        return [(task, name) for task, found in self.results["tasks"].items() for name in scores_of(found)]

    def values(self, task: str, name: str) -> dict[int, float]:
        """A score per document; empty if only the task as a whole has it."""
        rows = self.documents.get(task, {})
        return {number: float(row[name]) for number, row in rows.items() if isinstance(row.get(name), int | float)}

    def interval(self, task: str, name: str) -> tuple[float, float] | None:
        """95 % interval of a score: Wilson's where documents are right or wrong, else by the standard error."""
        values, score = list(self.values(task, name).values()), self.results["tasks"][task][name]
        if values and set(values) <= {0.0, 1.0} and math.isclose(mean(values), score, abs_tol=1e-9):
            return wilson(int(sum(values)), len(values))
        error = self.results["tasks"][task].get(f"{name}_stderr")
        return None if error is None else (score - Z * error, score + Z * error)


@dataclass(frozen=True)
class Change:
    """One score that two runs of `vtc eval` have in common.

    Attributes:
        first, second: the score of the whole task.
        fell, rose: documents whose score did.
        documents: how many both runs have.
        difference: mean over the documents, with its interval; `None` where documents have no such score.
        p: of the sign test, for this score alone.
    """

    task: str
    score: str
    first: float
    second: float
    fell: int = 0
    rose: int = 0
    documents: int = 0
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None

    def verdict(self, adjusted: float | None) -> str:
        """In words, by `p` and by the same for all scores together."""
        if self.p is None or adjusted is None:
            return "not paired"
        if self.fell == self.rose == 0:
            return "same scores"
        if adjusted >= LEVEL:
            return "noise" if self.p >= LEVEL else "unclear"
        return "changed: higher" if self.rose > self.fell else "changed: lower"


def found_in(path: Path) -> Path | None:
    """The folder of a run of `vtc eval`, if `path` is one, or a file of one."""
    folder = path.parent if path.name in ("results.json", "documents.jsonl") else path
    if (folder / "rows.jsonl").exists() or not (folder / "results.json").is_file():
        return None
    return folder


def load(path: Path) -> Evaluated:
    """Read a folder that `vtc eval` wrote.

    Raises:
        VtcError: a file cannot be read, or is not what `vtc eval` writes.
    """
    folder = found_in(path)
    if folder is None:
        raise VtcError(f"{path} has no results.json of vtc eval")
    file = folder / "results.json"
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VtcError(f"cannot read {file}: {error}; run vtc eval again, it goes on from its answers") from error
    missing = sorted(WANTED - set(results if isinstance(results, dict) else ()))
    if missing:
        raise VtcError(f"{file} is not what vtc eval writes, it lacks {', '.join(missing)}")
    documents: dict[str, dict[int, Row]] = {}
    if (folder / "documents.jsonl").exists():
        for number, row in lines.read(folder / "documents.jsonl"):
            if not {"task", "doc_id", "target"} <= row.keys():
                raise VtcError(f"{folder / 'documents.jsonl'}: line {number} is not a document of vtc eval")
            documents.setdefault(row["task"], {}).setdefault(row["doc_id"], row)  # repetitions share their scores
    return Evaluated(str(path), results, documents)


# ------------------------------------------------------------------------------------------------------------ one run


def tables(run: Evaluated) -> list[Table]:
    """Scores and cost per task, and accuracy per type of question where a task has types."""
    headings = (
        *("task", "score", "value", "95 % interval", "documents", "visual tokens", "prefill FLOPs", "KV cache"),
        *("TTFT ms", "output tokens"),
    )
    cells = []
    for task, name in run.scores():
        found, interval = run.results["tasks"][task], run.interval(task, name)
        between = "" if interval is None else f"[{interval[0]:.4f}, {interval[1]:.4f}]"
        cells.append((task, name, f"{found[name]:.4f}", between, str(found["n"]), *_costs(found)))
    made = [without_gaps("Scores and mean cost per task", headings, cells, NOTES)]
    for task, found in run.results["tasks"].items():
        if not found.get("by_type"):
            continue
        rows = [
            (kind, str(score["n"]), f"{100 * score['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
            for kind, score in found["by_type"].items()
            for low, high in [score["ci"]]
        ]
        title = f"{task}: accuracy per type of question, in %, with 95 % interval"
        made.append(Table(title, ("type", "questions", "accuracy"), tuple(rows)))
    return made


def _costs(found: Row) -> tuple[str, ...]:
    tokens, work = ("", "")
    if found.get("visual_tokens_in") is not None:
        tokens = f"{amount(found['visual_tokens_in'])} → {amount(found['visual_tokens_out'])}"
    if found.get("prefill_flops"):
        work = f"{human(found['prefill_flops'])} ({found['prefill_flops'] / found['prefill_flops_in']:.2f}×)"
    cache = f"{human(found['kv_cache_bytes'])}B" if found.get("kv_cache_bytes") else ""
    rest = ("" if found.get(key) is None else f"{found[key]:.1f}" for key in ("ttft_ms", "output_tokens"))
    return tokens, work, cache, *rest


def markdown(run: Evaluated) -> str:
    """The whole report of one run."""
    head = f"# {run.results['model']}\n\n{run.conditions}.\n"
    return "\n".join([head, *(table.markdown() for table in tables(run))])


def flat(run: Evaluated) -> list[Row]:
    """One line per score, all numbers."""
    made = []
    for task, name in run.scores():
        found = run.results["tasks"][task]
        low, high = run.interval(task, name) or (None, None)
        keys = [key for key in list(found)[list(found).index("n") :] if key != "by_type"]
        line = {"model": run.results["model"], "spec": run.results["spec"], "task": task, "score": name}
        made.append({**line, "value": found[name], "low": low, "high": high, **{key: found[key] for key in keys}})
    return made


# ----------------------------------------------------------------------------------------------------------- two runs


def compare(first: Evaluated, second: Evaluated) -> list[Change]:
    """The scores that both runs have.

    Raises:
        VtcError: a document has another right answer in the second run.
    """
    shared = [one for one in first.scores() if one in second.scores()]
    if not shared:
        raise VtcError(f"{first.name} and {second.name} have no score in common: run vtc eval on the same tasks")
    return [_change(first, second, task, name) for task, name in shared]


def _change(first: Evaluated, second: Evaluated, task: str, name: str) -> Change:
    before, after = (run.results["tasks"][task][name] for run in (first, second))
    one, two = first.values(task, name), second.values(task, name)
    both = [number for number in one if number in two]
    for number in both:
        targets = [run.documents[task][number]["target"] for run in (first, second)]
        if targets[0] != targets[1]:
            raise VtcError(
                f"document {number} of {task} is not the same in the two runs: its answer is {targets[0]!r} and "
                f"{targets[1]!r}; only runs of the same documents can be compared"
            )
    if not both:
        return Change(task, name, before, after)
    steps = [two[number] - one[number] for number in both]
    fell, rose = sum(step < 0 for step in steps), sum(step > 0 for step in steps)
    interval, p = _interval(one, two, both), mcnemar(fell, rose)
    return Change(task, name, before, after, fell, rose, len(both), mean(steps), interval, p)


def _interval(one: dict[int, float], two: dict[int, float], both: Sequence[int]) -> tuple[float, float] | None:
    """95 % interval of the mean difference: Newcombe's for right and wrong, else by the standard error."""
    pairs = [(one[number], two[number]) for number in both]
    if {value for pair in pairs for value in pair} <= {0.0, 1.0}:
        counts = [pairs.count(kind) for kind in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0))]
        return Pairs(*counts).interval
    if len(pairs) < 2:
        return None
    steps = [after - before for before, after in pairs]
    half = Z * stdev(steps) / math.sqrt(len(steps))
    return mean(steps) - half, mean(steps) + half


def comparison_table(first: Evaluated, second: Evaluated, changes: Sequence[Change]) -> Table:
    """One line per score that both runs have."""
    headings = (
        *("task", "score", "verdict", "value", "difference", "p", "p (Holm)", "documents", "fell", "rose"),
        *("visual tokens", "prefill FLOPs", "TTFT ms"),
    )
    adjusted = iter(holm([change.p for change in changes if change.p is not None]))
    cells = []
    for change in changes:
        p = None if change.p is None else next(adjusted)
        tested: tuple[str, ...] = ("", "", "", "", "", "")
        if change.difference is not None and change.p is not None and p is not None:
            between = "" if change.interval is None else f" [{change.interval[0]:+.4f}, {change.interval[1]:+.4f}]"
            counts = (change.documents, change.fell, change.rose)
            tested = (f"{change.difference:+.4f}{between}", f"{change.p:.3g}", f"{p:.3g}", *map(str, counts))
        cost = [run.results["tasks"][change.task] for run in (first, second)]
        cells.append(
            (
                *(change.task, change.score, change.verdict(p), f"{change.first:.4f} → {change.second:.4f}", *tested),
                _both([amount(one["visual_tokens_out"]) for one in cost if one.get("visual_tokens_out") is not None]),
                _both([human(one["prefill_flops"]) for one in cost if one.get("prefill_flops")]),
                _both([f"{one['ttft_ms']:.1f}" for one in cost if one.get("ttft_ms") is not None]),
            )
        )
    return without_gaps("What changed", headings, cells, COMPARISON_NOTES)


def remarks_on(first: Evaluated, second: Evaluated, changes: Sequence[Change]) -> list[str]:
    """What to know beside the table."""
    told = [*conditions_changed(first.results, second.results, ("model", "spec", "device", "dtype", "attention"))]
    found = [f"Other conditions: {'; '.join(told)}"] if told else []
    shared = {(change.task, change.score) for change in changes}
    for run in (first, second):
        only = [f"{task}: {name}" for task, name in run.scores() if (task, name) not in shared]
        if only:
            found.append(f"Only in {run.name}: {', '.join(only)}")
    return found


def flat_changes(changes: Sequence[Change]) -> list[Row]:
    """One line per score that both runs have, all numbers."""
    adjusted = iter(holm([change.p for change in changes if change.p is not None]))
    made = []
    for change in changes:
        p = None if change.p is None else next(adjusted)
        low, high = change.interval or (None, None)
        line: Row = {"task": change.task, "score": change.score, "verdict": change.verdict(p)}
        line |= {"value.first": change.first, "value.second": change.second, "difference": change.difference}
        line |= {"low": low, "high": high, "p": change.p, "p_holm": p}
        made.append({**line, "documents": change.documents, "fell": change.fell, "rose": change.rose})
    return made


def _both(texts: Sequence[str]) -> str:
    if len(texts) < 2:
        return ""
    return texts[0] if texts[0] == texts[1] else " → ".join(texts)


NOTES = """
Means over the documents of a task. TTFT: time to first token of a batch as it was asked, not measured in turns with the
uncompressed model. Intervals: Wilson's where documents are right or wrong, else from the task's standard error.
"""
COMPARISON_NOTES = f"""
Both runs answered the same documents. Fell, rose: documents whose score did. p: the exact sign test on these, which is
McNemar's where documents are right or wrong; for the line alone and by Holm's method for all lines together. Changed:
the latter is below {LEVEL}. Noise: not even the former is. Unclear: in between. All this treats documents as
independent draws; whether higher is better, the task knows.
"""
