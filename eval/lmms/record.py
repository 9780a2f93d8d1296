"""Answers on disk, one JSON line each, written as they are given: a run that is killed goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import vtc
from vtc import zoo
from vtc.errors import VtcError

MAX_FAILURES = 10  # after so many, something is wrong with more than a question

Row = dict[str, Any]
Key = tuple[str, str, int, int]  # task, split, document, repetition


def key_of(row: Row) -> Key:
    """Which question a row answers."""
    return row["task"], row["split"], row["doc_id"], row["repeat"]


@dataclass(frozen=True)
class Failure:
    """A question without an answer."""

    key: Key
    error: str

    def to_dict(self) -> dict[str, Any]:
        task, split, doc_id, repeat = self.key
        return {"task": task, "split": split, "doc_id": doc_id, "repeat": repeat, "error": self.error}

    def __str__(self) -> str:
        return f"{self.key[0]}, document {self.key[2]}: {self.error}"


class Failed(RuntimeError):
    """Some questions could not be answered."""

    def __init__(self, failures: Sequence[Failure]) -> None:
        self.failures = list(failures)
        listed = "; ".join(str(one) for one in self.failures[:MAX_FAILURES])
        super().__init__(f"{len(self.failures)} questions could not be answered: {listed}")


class Record:
    """The answers in a folder. Every process appends to a file of its own and has read those of all.

    Args:
        folder: where the files are; `None` keeps the answers in memory only.
        rank: number of this process.
    """

    def __init__(self, folder: Path | None, rank: int = 0) -> None:
        self.rows: dict[Key, Row] = {}
        self.path = None if folder is None else folder / f"answers-{rank}.jsonl"
        self._file: Any = None
        if folder is not None and self.path is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.rows = read_answers(folder)
            _cut_unfinished_line(self.path)

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, rows: Iterable[Row]) -> None:
        """Keep the answers; on disk when this returns."""
        lines = []
        for row in rows:
            self.rows[key_of(row)] = row
            lines.append(json.dumps(row) + "\n")
        if self.path is None:
            return
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write("".join(lines))
        self._file.flush()

    def known(self, key: Key, digest: str) -> Row | None:
        """The answer to this question, if it was given before."""
        row = self.rows.get(key)
        if row is not None and row["digest"] != digest:
            raise VtcError(
                f"document {key[2]} of {key[0]} asks something else than when {self.path and self.path.parent} was "
                "begun: choose another --out, or replace it with --overwrite"
            )
        return row


def identity(model: str, compressors: Sequence[str], **more: Any) -> dict[str, Any]:
    """What answers depend on, besides the question; the content of `run.json`."""
    versions = {"vtc": vtc.__version__, **{name: version(name) for name in ("torch", "transformers")}}
    spec = "+".join(compressors) or "none"
    return {"model": str(zoo.find(model).resolve()), "spec": spec, **more, "versions": versions}


def begin(folder: Path, asked: dict[str, Any]) -> None:
    """Begin a run in `folder`, or go on with the one that is there.

    Raises:
        VtcError: that one asked something else, or what is left of it cannot be read.
    """
    note = folder / "run.json"
    if note.exists():
        try:
            before = json.loads(note.read_text(encoding="utf-8"))
        except ValueError:
            raise VtcError(f"{note} is not readable: choose another --out, or start over with --overwrite") from None
        changed = [name for name, value in asked.items() if before.get(name) != value]
        if changed:
            was = ", ".join(f"{name} was {before.get(name)} and is {asked[name]}" for name in changed)
            raise VtcError(f"{folder} has another run: {was}; choose another --out, or replace it with --overwrite")
    elif next(folder.glob("answers-*.jsonl"), None) is not None:
        raise VtcError(f"{folder} has answers but no run.json: choose another --out, or start over with --overwrite")
    read_answers(folder)  # a broken line shows now, not after the model has worked
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")


def read_answers(folder: Path) -> dict[Key, Row]:
    """All answers in a folder, each question once."""
    rows: dict[Key, Row] = {}
    for path in sorted(folder.glob("answers-*.jsonl")):
        for row in read_lines(path):
            rows.setdefault(key_of(row), row)
    return rows


def read_lines(path: Path) -> list[Row]:
    """The objects in a file of JSON lines. A last line without its end, which a killed run leaves, does not count."""
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(json.loads(line))
            key_of(rows[-1])
        except (ValueError, KeyError, TypeError):
            raise VtcError(
                f"{path}, line {number} is not an answer: delete the line to ask again, or start over with --overwrite"
            ) from None
    return rows


def _cut_unfinished_line(path: Path) -> None:
    """New lines must not continue one that a killed run began."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
