"""The notebooks: each runs from top to bottom, and the copies in the documentation are copies of these."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from notebooks import render

NOTEBOOKS = render.sources()
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each
def test_it_runs(path: Path) -> None:
    notebook = render.execute(path)
    copy = render.render(notebook, path.stem)
    shown = set(re.findall(r"\]\(([\w.]+\.(?:png|webp))\)", copy.text))
    assert shown == set(copy.pictures)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    run = [cell for cell in code if "skip-execution" not in cell.metadata.get("tags", ())]
    assert run and all(cell.execution_count for cell in run)


@each
def test_it_is_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


@each
def test_its_copy_is_up_to_date(path: Path) -> None:
    """`make notebooks` was run after the last change."""
    copy = (render.COPIES / f"{path.stem}.md").read_text(encoding="utf-8")
    assert render.digest(nbformat.read(path, as_version=4)) in copy.partition("\n")[0]
    pictures = set(re.findall(r"\]\(([\w.]+\.(?:png|webp))\)", copy))
    assert pictures == {file.name for file in render.COPIES.glob(f"{path.stem}_*")}


def test_all_copies_are_of_notebooks_and_small() -> None:
    copies = list(render.COPIES.iterdir())
    assert {copy.stem for copy in copies if copy.suffix == ".md"} == {path.stem for path in NOTEBOOKS}
    assert sum(copy.stat().st_size for copy in copies) < 1_500_000
