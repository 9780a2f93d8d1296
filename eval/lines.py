"""JSON lines: one object per line, written as it comes about, read with an error that names a broken line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from vtc.errors import VtcError


def append(file: IO[str], objects: Iterable[dict[str, Any]]) -> None:
    """Write objects and flush: what was written survives the end of the process."""
    file.writelines(json.dumps(one) + "\n" for one in objects)
    file.flush()


def read(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file, each with the number of its line (from 1). Empty lines are skipped.

    Raises:
        VtcError: the file cannot be read, has no object, or a line is not a whole JSON object; the line is named, and
            if it is the last one, how to go on without it.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")  # a cut inside a character is a cut line
    except OSError as error:
        raise VtcError(f"cannot read {path}: {error.strerror or error}") from error
    found = []
    written = text.split("\n")
    for number, line in enumerate(written, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append((number, value))
        elif number == len(written):  # it does not end with a newline
            raise VtcError(
                f"{path}: line {number}, the last one, is cut off: {_excerpt(line)}. The run that wrote it was "
                f"stopped; delete that line to use the {len(found)} before it"
            )
        else:
            raise VtcError(f"{path}: line {number} is not a JSON object: {_excerpt(line)}")
    if not found:
        raise VtcError(f"{path} is empty: nothing was measured")
    return found


def _excerpt(line: str) -> str:
    text = line if len(line) <= 40 else f"{line[:40]}..."
    return repr(text.encode("utf-8", "replace").decode())
