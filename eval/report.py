"""What `vtc report` does: a run, or the comparison of two, as Markdown, CSV, LaTeX or one HTML page.

A run is what `vtc bench` left (rows, and answers beside them) or `vtc eval` (see `vtc.eval.evaluated`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtc.errors import VtcError
from vtc.eval import evaluated, groups, lines
from vtc.eval.evaluated import Evaluated
from vtc.eval.flops import human
from vtc.eval.paired import LEVEL, Change, Comparison, compare
from vtc.eval.table import (
    Table,
    amount,
    conditions,
    latex,
    prefill_flops,
    remarks_of,
    render,
    tables,
    visual_tokens,
    without_gaps,
)

Row = dict[str, Any]
Sample = dict[str, Any]

FORMATS = ("md", "csv", "latex", "html")
ENDINGS = {".md": "md", ".markdown": "md", ".csv": "csv", ".tex": "latex", ".html": "html", ".htm": "html"}
# What the tables need of a row; times may be null, and accuracy where there was nothing to answer.
ROW_KEYS = frozenset(
    [
        *("model", "spec", "strategy", "keep", "seed", "n", "accuracy", "accuracy_ci", "by_type", "agreement"),
        *("tokens_in", "tokens_out", "prefill_flops", "prefill_flops_ratio", "kv_cache_bytes"),
        *("ttft_ms", "decode_tokens_per_s", "device", "dtype", "attention", "threads", "versions", "date"),
    ]
)
SAMPLE_KEYS = frozenset(["spec", "id", "type", "question", "expected", "answer", "right", "tokens_in", "tokens_out"])
NOTES = f"""
Both runs answered the same questions. Lost: right only in the first run; gained: right only in the second. p: McNemar's
exact test on lost and gained, for the line alone and by Holm's method for all lines together. Changed: the latter is
below {LEVEL}. Noise: not even the former is, so such a difference is no surprise if nothing changed; the interval of
the difference says how large a change could have hidden in it. Unclear: in between; more questions would tell. All this
treats the questions as independent draws. Tokens and FLOPs: means over the questions; times: of one prompt.
"""


@dataclass(frozen=True)
class Run:
    """What one run left behind."""

    name: str  # how the user named it
    rows: list[Row]
    samples: dict[str, dict[str, Sample]]  # per spec, by id; empty for a run without samples

    def tables(self) -> list[Table]:
        """Everything that can be told of it."""
        return [*tables(self.rows), *groups.tables(self.rows, self.samples)]


def load(path: Path) -> Run:
    """Read a folder that `vtc bench` wrote, or a file of rows.

    The samples are in `samples.jsonl` beside `rows.jsonl`, and in `NAME.samples.jsonl` beside a `NAME.jsonl`.

    Raises:
        VtcError: there is no such file, or a line is cut off, lacks what a row has, or repeats another.
    """
    if path.is_dir() and not (path / "rows.jsonl").exists():
        raise VtcError(f"{path} has no rows.jsonl; give a folder that vtc bench or vtc eval wrote, or a file of rows")
    file = path / "rows.jsonl" if path.is_dir() else path
    beside = "samples.jsonl" if file.name == "rows.jsonl" else f"{file.stem}.samples.jsonl"
    rows = _rows(file)
    samples = file.with_name(beside)
    there = samples.exists() and samples.stat().st_size > 0  # random weights are asked nothing
    return Run(str(path), rows, _samples(samples, {row["spec"] for row in rows}) if there else {})


def report(paths: Sequence[Path], form: str, *, drawings: int = 12) -> str:
    """The report of one run, or the comparison of two.

    Args:
        paths: one or two runs, see `load`.
        form: `md`, `csv`, `latex` or `html`.
        drawings: how many disagreements with the full model the HTML page shows.
    """
    if not 1 <= len(paths) <= 2:
        raise VtcError(f"vtc report takes one run, or two to compare; got {len(paths)}")
    if form not in FORMATS:
        raise VtcError(f"--format is '{form}'; use one of {', '.join(FORMATS)}")
    if drawings < 0:
        raise VtcError(f"--samples is {drawings}; use 0 or more")
    kinds = [evaluated.found_in(path) is not None for path in paths]
    if all(kinds):
        return _report_evaluated([evaluated.load(path) for path in paths], form)
    if any(kinds):
        raise VtcError(f"{paths[kinds.index(True)]} is from vtc eval and the other from vtc bench: give two of a kind")
    return _report_runs([load(path) for path in paths], form, drawings)


def _report_runs(runs: Sequence[Run], form: str, drawings: int) -> str:
    """Of `vtc bench`."""
    first, last = runs[0], runs[-1]
    comparison = compare(first.rows, last.rows, first.samples, last.samples) if len(runs) == 2 else None
    found = comparison_table(comparison) if comparison else None
    remarks = remarks_on(comparison, first.name, last.name) if comparison else []
    if form == "html":
        from vtc.eval.page import page, section

        return page([section(run, drawings) for run in runs], found, remarks)
    if comparison is None or found is None:
        return {"md": markdown, "csv": as_csv, "latex": as_latex}[form](first)
    if form == "csv":
        return _csv([_flat_change(change) for change in comparison.changes])
    return _comparison(first.name, last.name, found, remarks, form)


def _report_evaluated(runs: Sequence[Evaluated], form: str) -> str:
    """Of `vtc eval`."""
    first, last = runs[0], runs[-1]
    changes = evaluated.compare(first, last) if len(runs) == 2 else []
    found = evaluated.comparison_table(first, last, changes) if changes else None
    remarks = evaluated.remarks_on(first, last, changes) if changes else []
    if form == "html":
        from vtc.eval.page import page, plain_section

        sections = [
            plain_section(run.name, run.results["model"], run.conditions, evaluated.tables(run)) for run in runs
        ]
        return page(sections, found, remarks)
    if form == "csv":
        return _csv(evaluated.flat_changes(changes) if changes else evaluated.flat(first))
    if found is not None:
        return _comparison(first.name, last.name, found, remarks, form)
    if form == "md":
        return evaluated.markdown(first)
    head = f"% {latex(first.results['model'])}: {latex(first.conditions)}\n"
    return "\n".join([BOOKTABS + head, *(table.latex() for table in evaluated.tables(first))])


def _comparison(first: str, last: str, found: Table, remarks: Sequence[str], form: str) -> str:
    if form == "latex":
        return BOOKTABS + found.latex()
    told = "".join(f"- {line}\n" for line in remarks)
    return f"# {first} → {last}\n\n{told}\n{found.markdown()}"


def choose(form: str | None, out: Path | None) -> str:
    """The format asked for, or that of a file's name; Markdown if neither says."""
    if form is not None or out is None:
        return form or "md"
    if out.suffix.lower() not in ENDINGS:
        raise VtcError(
            f"--out {out}: the name does not say a format; end it in .html, .md, .csv or .tex, or use --format"
        )
    return ENDINGS[out.suffix.lower()]


def write(text: str, out: Path, runs: Sequence[Path]) -> None:
    """Write a report to a file, which may not be in the way of its runs.

    Raises:
        VtcError: the place is a folder, a result, or cannot be written to.
    """
    files = ("", "rows.jsonl", "samples.jsonl", "results.json", "documents.jsonl")
    results = {(run / name).resolve() for run in runs for name in files}
    if out.resolve() in results and not out.is_dir():
        raise VtcError(f"--out {out} is what the report is made from; give another file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise VtcError(f"--out {out}: {error.strerror or error}; give a file") from error


# ------------------------------------------------------------------------------------------------------- reading


def _rows(path: Path) -> list[Row]:
    found: dict[str, tuple[int, Row]] = {}
    for number, row in lines.read(path):
        missing = sorted(ROW_KEYS - row.keys())
        if missing:
            what = "are these samples? Give rows.jsonl" if row.keys() >= SAMPLE_KEYS else "vtc bench writes such rows"
            raise VtcError(f"{path}: line {number} is not a row of results, it lacks {', '.join(missing)}; {what}")
        if row["spec"] in found:
            raise VtcError(f"{path}: line {number} repeats {row['spec']} of line {found[row['spec']][0]}")
        first = next(iter(found.values()))[1] if found else row
        if row["model"] != first["model"]:
            raise VtcError(
                f"{path}: line {number} is about {row['model']} and line 1 about {first['model']}; one file per model"
            )
        found[row["spec"]] = number, row
    return [row for _, row in found.values()]


def _samples(path: Path, specs: set[str]) -> dict[str, dict[str, Sample]]:
    """Per spec, by id. Samples of a setting without a row are left out: the run was stopped before it was whole."""
    found: dict[str, dict[str, Sample]] = {}
    for number, sample in lines.read(path):
        missing = sorted(SAMPLE_KEYS - sample.keys())
        if missing:
            raise VtcError(f"{path}: line {number} is not a sample, it lacks {', '.join(missing)}")
        if sample["spec"] not in specs:
            continue
        mine = found.setdefault(sample["spec"], {})
        if sample["id"] in mine:
            raise VtcError(f"{path}: line {number} answers {sample['id']} a second time for {sample['spec']}")
        mine[sample["id"]] = sample
    return found


# ------------------------------------------------------------------------------------------------------- writing

BOOKTABS = "% needs \\usepackage{booktabs}\n"


def markdown(run: Run) -> str:
    """All tables, and above them how they came about."""
    return render(run.rows, groups.tables(run.rows, run.samples))


def as_csv(run: Run) -> str:
    """One line per row, every number in a column of its own: `by_type` becomes `by_type.digit.accuracy`, ..."""
    more = groups.columns(run.rows, run.samples)
    return _csv([{**_flat(row), **more.get(row["spec"], {})} for row in run.rows])


def as_latex(run: Run) -> str:
    """The tables as LaTeX floats."""
    head = f"% {latex(run.rows[0]['model'])}: {latex(conditions(run.rows[0]))}\n"
    told = "".join(f"% {latex(line)}\n" for line in remarks_of(run.rows))
    return "\n".join([BOOKTABS + head + told, *(table.latex() for table in run.tables())])


def comparison_table(comparison: Comparison) -> Table:
    """One line per setting that both runs have."""
    headings = (
        *("setting", "verdict", "accuracy %", "difference, points", "p", "p (Holm)", "questions", "lost", "gained"),
        *("visual tokens", "prefill FLOPs", "TTFT ms"),
    )
    return without_gaps("What changed", headings, [_cells(change) for change in comparison.changes], NOTES)


def remarks_on(comparison: Comparison, first: str, second: str) -> list[str]:
    """What to know beside the table: verdicts counted, other conditions, settings that one run lacks."""
    verdicts = [change.verdict for change in comparison.changes]
    changed = sum(verdict.startswith("changed") for verdict in verdicts)
    found = [f"{len(verdicts)} settings in both runs, {changed} changed by more than noise"]
    if comparison.conditions:
        found.append(f"Other conditions: {'; '.join(comparison.conditions)}")
    if "not paired" in verdicts:
        found.append(
            f"Not paired: {verdicts.count('not paired')} settings, because a run lacks the samples that vtc bench "
            "writes beside its rows, or no question is in both"
        )
    for name, only in ((first, comparison.only_first), (second, comparison.only_second)):
        if only:
            found.append(f"Only in {name}: {', '.join(only)}")
    return found


def _cells(change: Change) -> tuple[str, ...]:
    first, second, pairs = change.first, change.second, change.pairs

    def both(of: Callable[[Row], float | None], form: Callable[[float], str]) -> str:
        values = [of(row) for row in (first, second)]
        texts = [form(value) for value in values if value is not None]
        if len(texts) < 2:
            return ""
        return texts[0] if texts[0] == texts[1] else " → ".join(texts)

    tested = ("", "", "", "", "", "")
    if pairs is not None and change.p is not None:
        low, high = pairs.interval
        difference = f"{_signed(pairs.difference)} [{_signed(low)}, {_signed(high)}]"
        tested = (difference, _p(pairs.p), _p(change.p), str(pairs.n), str(pairs.lost), str(pairs.gained))
    return (
        change.name,
        change.verdict,
        both(lambda row: row["accuracy"], lambda share: f"{100 * share:.1f}"),
        *tested,
        both(visual_tokens, amount),
        both(prefill_flops, human),
        both(lambda row: row["ttft_ms"], "{:.1f}".format),
    )


def _signed(share: float) -> str:
    text = f"{100 * share:+.1f}"
    return text.replace("-", "−") if float(text) else "0.0"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _flat(row: Row) -> Row:
    """Nested values under dotted names, intervals as `low` and `high`."""
    flat: Row = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": one for inner, one in _flat(value).items()})
        elif isinstance(value, list) and len(value) == 2:
            stem = "" if key == "ci" else f"{key.removesuffix('_ci')}."
            flat[f"{stem}low"], flat[f"{stem}high"] = value
        else:
            flat[key] = value
    return flat


def _flat_change(change: Change) -> Row:
    flat: Row = {"setting": change.name, "verdict": change.verdict, "p_holm": change.p}
    pairs = change.pairs
    names = ("n", "both", "lost", "gained", "neither", "difference", "p")
    flat.update({name: None if pairs is None else getattr(pairs, name) for name in names})
    flat["low"], flat["high"] = (None, None) if pairs is None else pairs.interval
    means = ("mean_tokens_out", "mean_prefill_flops")
    for key in ("accuracy", *means, "tokens_out", "prefill_flops", "ttft_ms", "kv_cache_bytes"):
        flat[f"{key}.first"], flat[f"{key}.second"] = change.first.get(key), change.second.get(key)
    return flat


def _csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    names = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
