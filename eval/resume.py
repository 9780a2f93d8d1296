"""Going on with a run of `vtc bench` that was stopped: what it measured is kept, what it left half-done is dropped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtc.errors import VtcError
from vtc.eval import lines

Row = dict[str, Any]
SAME = (
    *("model", "task", "prompt", "n", "family", "device", "dtype", "attention", "threads", "flops_convention"),
    "versions",
)
WORDS = {"n": "the number of questions", "timed": "whether times are measured"}


@dataclass(frozen=True)
class Earlier:
    """What there is already."""

    rows: list[Row] = field(default_factory=list)
    reference: list[str] | None = None  # the full model's answers, in the order of the questions

    @property
    def specs(self) -> set[str]:
        return {row["spec"] for row in self.rows}

    @property
    def work(self) -> float | None:
        """Mean FLOPs of the full model's prefill."""
        return next((row.get("mean_prefill_flops") for row in self.rows if row["spec"] == "none"), None)


def load(folder: Path, now: Row, questions: Sequence[str]) -> Earlier:
    """What an earlier run left in a folder; the files are cleaned of what it did not finish.

    Args:
        folder: with `rows.jsonl` and `samples.jsonl`, or with neither.
        now: what a row of this run would say of the conditions; they must be the same. `timed` says whether times are
            measured.
        questions: ids of the questions of this run, in order.

    Raises:
        VtcError: the earlier run was of another kind, or its samples do not fit its rows.
    """
    files = rows_file, samples_file = folder / "rows.jsonl", folder / "samples.jsonl"
    for path in files:
        _drop_cut_line(path)
    rows = [row for _, row in lines.read(rows_file)] if _filled(rows_file) else []
    if not rows:
        return Earlier()
    for row in rows:
        _check(rows_file, row, now)
    answers: dict[str, list[tuple[str, str]]] = {row["spec"]: [] for row in rows}
    samples = [sample for _, sample in lines.read(samples_file)] if _filled(samples_file) else []
    whole = [sample for sample in samples if sample["spec"] in answers]
    for sample in whole:
        answers[sample["spec"]].append((sample["id"], sample["answer"]))
    for spec, found in answers.items():
        if [key for key, _ in found] != list(questions):
            raise VtcError(
                f"{samples_file} does not have the answers to these {len(questions)} questions for {spec}; "
                "choose another --out, or replace what is there with --overwrite"
            )
    if len(whole) < len(samples):  # the setting during which the run was stopped
        _replace(samples_file, whole)
    return Earlier(rows, [answer for _, answer in answers["none"]] if "none" in answers else None)


def _check(path: Path, row: Row, now: Row) -> None:
    timed = row.get("ttft_ms") is not None
    pairs = [(name, row.get(name), now[name]) for name in SAME] + [("timed", timed, now["timed"])]
    other = [f"{WORDS.get(name, name)} was {before} and is {after}" for name, before, after in pairs if before != after]
    if other:
        raise VtcError(
            f"{path} is from a run of another kind: {'; '.join(other)}. Choose another --out, or replace what is "
            "there with --overwrite"
        )


def _filled(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _drop_cut_line(path: Path) -> None:
    """A last line without its newline was being written when the run was stopped."""
    if not _filled(path):
        return
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)


def _replace(path: Path, objects: Iterable[dict[str, Any]]) -> None:
    """New content at once: a stop in between leaves the old one."""
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(one) + "\n" for one in objects), encoding="utf-8")
    new.replace(path)
