"""Rows of a run as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

from tabulate import tabulate

from vtc.eval.flops import human

Row = dict[str, Any]
Column = tuple[str, Callable[[list[Row]], str]]  # heading, and the cell of a group of rows


def label(spec: str) -> str:
    """A spec without its `keep` and `seed`, which have columns of their own or are averaged over."""
    name, _, rest = spec.partition(":")
    parts = [part for part in rest.split(",") if part and part.partition("=")[0] not in ("keep", "seed")]
    return f"{name}:{','.join(parts)}" if parts else name


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in nothing but the seed belong together; order of first appearance."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        # Other strategies may have a seed too, but only `random` is run with several.
        name = label(row["spec"]) if row["strategy"] == "random" else row["spec"]
        found.setdefault((name, repr(row["keep"])), []).append(row)
    return list(found.values())


def render(rows: Sequence[Row]) -> str:
    """The whole report: results, time to first token in parts, accuracy per type of question."""
    first = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    head = (
        f"# {first['model']}\n\n{first['n']} questions; {first['device']}, {first['dtype']}, "
        f"{first['attention']} attention, {first['threads']} threads; {versions}; {first['date'][:10]}.\n"
    )
    sections = [head, "## Results\n", _markdown(rows, RESULTS), NOTES]
    if first["ttft_ms"] is not None:
        sections += ["## Time to first token, in ms\n", _markdown(rows, TIMES), TIME_NOTES]
    kinds = [(name, _kind(name)) for name in first["by_type"]]
    sections += ["## Accuracy per type of question, in %, with 95 % interval\n", _markdown(rows, [*NAME, *kinds])]
    return "\n".join(sections) + "\n"


def _markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    cells = [[cell(group) for _, cell in columns] for group in groups(rows)]
    align = ["left"] + ["right"] * (len(columns) - 1)
    return tabulate(cells, [name for name, _ in columns], tablefmt="pipe", colalign=align, disable_numparse=True) + "\n"


def _name(group: list[Row]) -> str:
    name = label(group[0]["spec"])
    return f"{name} ({len(group)} seeds)" if len(group) > 1 else name


def _keep(group: list[Row]) -> str:
    return "" if group[0]["strategy"] in ("none", "blind") else str(group[0]["keep"])


def _number(key: str, form: Callable[[float], str]) -> Callable[[list[Row]], str]:
    """The mean of a group; empty if it was not measured."""
    return lambda group: "" if group[0][key] is None else form(mean(row[key] for row in group))


def _accuracy(group: list[Row]) -> str:
    """One run: accuracy and interval. Several seeds: mean and standard deviation."""
    values = [100 * row["accuracy"] for row in group]
    if len(values) > 1:
        return f"{mean(values):.1f} ± {stdev(values):.1f}"
    low, high = group[0]["accuracy_ci"]
    return f"{values[0]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _kind(kind: str) -> Callable[[list[Row]], str]:
    def cell(group: list[Row]) -> str:
        scores = [row["by_type"][kind] for row in group]
        values = [100 * score["accuracy"] for score in scores]
        if len(values) > 1:
            return f"{mean(values):.0f} ± {stdev(values):.0f}"
        low, high = scores[0]["ci"]
        return f"{values[0]:.0f} [{100 * low:.0f}, {100 * high:.0f}]"

    return cell


def _tokens(group: list[Row]) -> str:
    return f"{group[0]['tokens_in']} → {group[0]['tokens_out']}"


def _flops(group: list[Row]) -> str:
    return f"{human(group[0]['prefill_flops'])} ({group[0]['prefill_flops_ratio']:.2f}×)"


def _ttft(group: list[Row]) -> str:
    if group[0]["ttft_ms"] is None:
        return ""
    speedup = mean(row["ttft_speedup"] for row in group)
    return f"{mean(row['ttft_ms'] for row in group):.1f} ({speedup:.2f}×)"


NAME: list[Column] = [("strategy", _name), ("keep", _keep)]
RESULTS: list[Column] = [
    *NAME,
    ("visual tokens", _tokens),
    ("prefill FLOPs", _flops),
    ("TTFT ms", _ttft),
    ("decode tok/s", _number("decode_tokens_per_s", "{:.0f}".format)),
    ("KV cache", _number("kv_cache_bytes", lambda size: f"{human(size)}B")),
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
One prompt at a time. TTFT: time to first token, and in brackets how many times faster than the uncompressed model
measured in the same loop. Accuracy: exact match, with Wilson's 95 % interval, or mean ± standard deviation over seeds.
Agreement: same answer as the uncompressed model. `none` is the uncompressed model, `blind` answers without the picture.
"""
TIME_NOTES = """
Medians over repeats. Other: filling placeholders, and Python between the parts. IQR: spread of the total. Ideal: the
total if the dropped tokens had never existed; the distance to it is the cost of choosing and dropping them.
"""
