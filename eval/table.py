"""Rows of a run as tables, in Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Literal

from tabulate import tabulate

from vtc.eval.flops import human

Row = dict[str, Any]
Column = tuple[str, Callable[[list[Row]], str]]  # heading, and the cell of a group of rows


@dataclass(frozen=True)
class Table:
    """Text in rows and columns; the first column names the row."""

    title: str
    headings: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    notes: str = ""  # one paragraph, `code` in backticks

    def markdown(self) -> str:
        """The table with its title above and its notes below."""
        cells = [[_markdown(cell) for cell in row] for row in self.cells]
        align = ["left"] + ["right"] * (len(self.headings) - 1)
        headings = [_markdown(heading) for heading in self.headings]
        grid = tabulate(cells, headings, tablefmt="pipe", colalign=align if cells else None, disable_numparse=True)
        return f"## {self.title}\n\n{grid}\n" + (f"\n{self.notes.strip()}\n" if self.notes else "")

    def latex(self) -> str:
        """The table as a float with a caption; it needs the package booktabs."""
        lines = [" & ".join(map(latex, row)) + r" \\" for row in (self.headings, *self.cells)]
        spec = "l" + "r" * (len(self.headings) - 1)
        return "\n".join(
            [
                r"\begin{table}",
                r"  \centering",
                rf"  \caption{{{latex(self.title)}}}",
                rf"  \begin{{tabular}}{{{spec}}}",
                r"    \toprule",
                f"    {lines[0]}",
                r"    \midrule",
                *(f"    {line}" for line in lines[1:]),
                r"    \bottomrule",
                r"  \end{tabular}",
                r"\end{table}",
                "",
            ]
        )


def label(spec: str) -> str:
    """A spec without the `keep` and `seed` of its first strategy, which have a column or are averaged over."""
    first, *others = spec.split("+")
    name, _, rest = first.partition(":")
    parts = [part for part in rest.split(",") if part and part.partition("=")[0] not in ("keep", "seed")]
    return "+".join([f"{name}:{','.join(parts)}" if parts else name, *others])


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in nothing but the seed belong together; order of first appearance."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        # Other strategies may have a seed too, but only `random` is run with several.
        name = label(row["spec"]) if row["strategy"].partition("+")[0] == "random" else row["spec"]
        found.setdefault((name, repr(row["keep"])), []).append(row)
    return list(found.values())


def render(rows: Sequence[Row], more: Sequence[Table] = ()) -> str:
    """The report in Markdown: results, time to first token in parts, accuracy per type of question, and `more`."""
    first = rows[0]
    head = f"# {first['model']}\n\n{conditions(first)}.\n"
    remarks = "".join(f"- {line}\n" for line in remarks_of(rows))
    return "\n".join([head, *filter(None, [remarks]), *(table.markdown() for table in (*tables(rows), *more))])


def conditions(row: Row) -> str:
    """How a row was measured, as one line."""
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    task = f" of the task {row['task']}" if row.get("task") else ""
    asked = row.get("prompt") or f"{row['n']} questions{task}"
    return (
        f"{asked}; {row['device']}, {row['dtype']}, {row['attention']} attention, "
        f"{row['threads']} threads; {versions}; {row['date'][:10]}"
    )


def remarks_of(rows: Sequence[Row]) -> list[str]:
    """What a run says of itself as a whole, such as why a baseline is missing."""
    return list(dict.fromkeys(line for row in rows for line in row.get("remarks") or ()))


def tables(rows: Sequence[Row]) -> list[Table]:
    """What can be told of a run; times only if they were measured."""
    found = [_table("Results", rows, RESULTS, NOTES)]
    if rows[0]["ttft_ms"] is not None:
        found.append(_table("Time to first token, in ms", rows, TIMES, TIME_NOTES))
    kinds = dict.fromkeys(kind for row in rows for kind in row["by_type"])
    if kinds:
        columns = [*NAME, *((kind, _kind(kind)) for kind in kinds)]
        found.append(_table("Accuracy per type of question, in %, with 95 % interval", rows, columns))
    return found


def prefill_flops(row: Row) -> float:
    """FLOPs of the language model's prefill: the mean over the questions, or of the prompt that was timed."""
    found = row.get("mean_prefill_flops")
    return row["prefill_flops"] if found is None else found


def amount(value: float) -> str:
    """A count, which as a mean may not be whole."""
    return f"{value:.1f}".removesuffix(".0")


def without_gaps(title: str, headings: Sequence[str], cells: Sequence[Sequence[str]], notes: str = "") -> Table:
    """A table without the columns that are empty, of which nothing was measured."""
    full = [column for column in range(len(headings)) if not cells or any(row[column] for row in cells)]
    rows = tuple(tuple(row[column] for column in full) for row in cells)
    return Table(title, tuple(headings[column] for column in full), rows, notes)


def latex(text: str) -> str:
    """`text` with what LaTeX would take for commands written out."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def _table(title: str, rows: Sequence[Row], columns: Sequence[Column], notes: str = "") -> Table:
    cells = [[cell(group) for _, cell in columns] for group in groups(rows)]
    return without_gaps(title, [name for name, _ in columns], cells, notes)


def _markdown(text: str) -> str:
    """`text` as one cell: bars and brackets stand for themselves."""
    return text.replace("|", r"\|").replace("<", "&lt;").replace("\n", " ")


def name_of(group: Sequence[Row]) -> str:
    """How a group of rows is called in a table."""
    name = label(group[0]["spec"])
    return f"{name} ({len(group)} seeds)" if len(group) > 1 else name


def keep_of(group: Sequence[Row]) -> str:
    """Its budget, if it has one."""
    return "" if group[0]["strategy"] in ("none", "blind") else str(group[0]["keep"])


def _number(key: str, form: Callable[[float], str]) -> Callable[[list[Row]], str]:
    """The mean of a group; empty if it was not measured."""
    return lambda group: "" if group[0].get(key) is None else form(mean(row[key] for row in group))


def _accuracy(group: list[Row]) -> str:
    """One run: accuracy and interval. Several seeds: mean and standard deviation."""
    if group[0]["accuracy"] is None:
        return ""
    values = [100 * row["accuracy"] for row in group]
    if len(values) > 1:
        return f"{mean(values):.1f} ± {stdev(values):.1f}"
    low, high = group[0]["accuracy_ci"]
    return f"{values[0]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _kind(kind: str) -> Callable[[list[Row]], str]:
    def cell(group: list[Row]) -> str:
        scores = [row["by_type"][kind] for row in group if kind in row["by_type"]]
        if not scores:
            return ""
        values = [100 * score["accuracy"] for score in scores]
        if len(values) > 1:
            return f"{mean(values):.0f} ± {stdev(values):.0f}"
        low, high = scores[0]["ci"]
        return f"{values[0]:.0f} [{100 * low:.0f}, {100 * high:.0f}]"

    return cell


def tokens_of(group: Sequence[Row]) -> str:
    """Visual tokens before and after."""
    return " → ".join(amount(visual_tokens(group[0], end)) for end in ("in", "out"))


def visual_tokens(row: Row, end: Literal["in", "out"] = "out") -> float:
    """Visual tokens as measured: the mean over the questions, or those of the prompt that was timed."""
    found = row.get(f"mean_tokens_{end}")
    return row[f"tokens_{end}"] if found is None else found


def _flops(group: list[Row]) -> str:
    return f"{human(prefill_flops(group[0]))} ({group[0]['prefill_flops_ratio']:.2f}×)"


def _ttft(group: list[Row]) -> str:
    if group[0]["ttft_ms"] is None:
        return ""
    speedup = mean(row["ttft_speedup"] for row in group)
    return f"{mean(row['ttft_ms'] for row in group):.1f} ({speedup:.2f}×)"


LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "×": r"$\times$",
    "±": r"$\pm$",
    "→": r"$\to$",
    "−": r"$-$",
    "\n": " ",
}
NAME: list[Column] = [("strategy", name_of), ("keep", keep_of)]
RESULTS: list[Column] = [
    *NAME,
    ("visual tokens", tokens_of),
    ("prefill FLOPs", _flops),
    ("TTFT ms", _ttft),
    ("decode tok/s", _number("decode_tokens_per_s", "{:.0f}".format)),
    ("KV cache", _number("kv_cache_bytes", lambda size: f"{human(size)}B")),
    ("peak memory", _number("peak_memory_bytes", lambda size: f"{human(size)}B")),
    ("accuracy %", _accuracy),
    ("agreement %", _number("agreement", lambda share: f"{100 * share:.1f}")),
]
TIMES: list[Column] = [
    *NAME,
    ("encoder", _number("encoder_ms", "{:.2f}".format)),
    ("projector", _number("projector_ms", "{:.2f}".format)),
    ("selection", _number("selection_ms", "{:.2f}".format)),
    ("prefill", _number("prefill_ms", "{:.2f}".format)),
    ("other", _number("other_ms", "{:.2f}".format)),
    ("total", _number("ttft_ms", "{:.2f}".format)),
    ("IQR", _number("ttft_iqr_ms", "{:.2f}".format)),
    ("ideal", _number("ideal_ttft_ms", "{:.2f}".format)),
]
NOTES = """
Tokens and FLOPs: means over the questions. Times, caches and memory: of one prompt, with a picture of the usual size.
TTFT: time to first token, and in brackets how many times faster than the uncompressed model measured in the same loop.
Accuracy: exact match, with Wilson's 95 % interval, or mean ± standard deviation over seeds. Agreement: same answer as
the uncompressed model. `none` is the uncompressed model, `blind` answers without the picture.
"""
TIME_NOTES = """
Medians over repeats. Selection: choosing and dropping tokens, in front of the language model and inside it; what a
strategy reads of the encoder is computed there, and counts in the encoder's time. Prefill: the language model without
selection. Other: filling placeholders, and Python between the parts. IQR: spread of the total. Ideal: the total if the
dropped tokens had never existed; the distance to it is the cost of choosing and dropping them.
"""
