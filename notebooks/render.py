"""Run the notebooks and write their copies for the documentation: `make notebooks`.

The repository holds notebooks without outputs, and what they print and draw in `docs/notebooks/`. A copy names the
digest of the cells that it was made from, so that a test can tell when it is out of date.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
COPIES = HERE.parent / "docs" / "notebooks"
LIMIT = 180  # seconds for a whole notebook on a CPU
PLAIN = 40_000  # bytes up to which a picture stays a PNG
QUALITY = 82  # of WebP, for larger ones
# As for the tests: a torchvision for another build of torch keeps transformers from loading models.
MEND = "from vtc.zoo import torchvision; torchvision.mend()"


@dataclass
class Copy:
    """A notebook as a page: Markdown, and the pictures that it shows."""

    text: str
    pictures: dict[str, bytes] = field(default_factory=dict)


def sources() -> list[Path]:
    """All notebooks, in the order in which to read them."""
    return sorted(HERE.glob("*.ipynb"))


def digest(notebook: Any) -> str:
    """SHA-256 over the cells, without their outputs."""
    parts = "\0".join(f"{cell.cell_type}\n{cell.source}\n{dict(cell.metadata)}" for cell in notebook.cells)
    return hashlib.sha256(parts.encode()).hexdigest()


def execute(path: Path) -> Any:
    """The notebook with its outputs, run from top to bottom in a process of its own.

    Cells with the tag `skip-execution` are passed over; they need what not every machine has.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=LIMIT,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        coalesce_streams=True,
        record_timing=False,
        extra_arguments=["--HistoryManager.enabled=False", f"--IPKernelApp.exec_lines={MEND}"],
    )
    # The models are so small that a second thread only adds waiting, on a busy machine a hundredfold.
    return client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})


def render(notebook: Any, name: str) -> Copy:
    """The page of a notebook that has run. `name` is that of its file, without the ending."""
    copy = Copy(f"<!-- Made from notebooks/{name}.ipynb by `make notebooks`: {digest(notebook)} -->\n\n")
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            copy.text += f"{relink(cell.source)}\n\n"
            continue
        copy.text += f"```python\n{cell.source}\n```\n\n"
        alts = iter(cell.metadata.get("alt", ()))
        for output in cell.outputs:
            copy.text += "".join(_shown(output, alts, name, copy.pictures))
    copy.text += f"*Made from `notebooks/{name}.ipynb`, which you can run yourself.*\n"
    return copy


def relink(text: str) -> str:
    """Links to notebooks and to the documentation as seen from the pages."""
    text = re.sub(r"\]\((\w+)\.ipynb", r"](\1.md", text)
    return text.replace("](../docs/", "](../").replace("](../CONTRIBUTING.md", "](../contributing.md")


def write(copy: Copy, name: str) -> None:
    """Replace the page of a notebook and its pictures."""
    COPIES.mkdir(exist_ok=True)
    for old in COPIES.glob(f"{name}*"):
        old.unlink()
    (COPIES / f"{name}.md").write_text(copy.text, encoding="utf-8")
    for file, data in copy.pictures.items():
        (COPIES / file).write_bytes(data)


def _shown(output: Any, alts: Iterator[str], name: str, pictures: dict[str, bytes]) -> Iterator[str]:
    """What an output looks like on the page; `pictures` get what it draws."""
    if output.output_type == "stream":
        if output.name == "stdout":  # progress bars go to the other one
            yield _block(output.text)
        return
    data = output.get("data", {})
    if "image/png" in data:
        alt = next(alts, None)
        if alt is None:
            raise ValueError(f"{name}: a picture has no description: add one to `alt` in the metadata of its cell")
        file, picture = _smaller(base64.b64decode(data["image/png"]), f"{name}_{len(pictures) + 1}")
        pictures[file] = picture
        yield f"[![{alt}]({file})]({file})\n\n"  # a click shows it as large as it is
    elif "text/markdown" in data:
        yield f"{data['text/markdown'].strip()}\n\n"
    elif "text/plain" in data:
        yield _block(data["text/plain"])


def _block(text: str) -> str:
    return f"```{{.text .output}}\n{text.rstrip()}\n```\n\n"


def _smaller(png: bytes, stem: str) -> tuple[str, bytes]:
    """Name and bytes of a picture: photographs and textures are ten times smaller as WebP."""
    if len(png) <= PLAIN:
        return f"{stem}.png", png
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(out, "WEBP", quality=QUALITY, method=6)
    return f"{stem}.webp", out.getvalue()


def main(names: list[str]) -> None:
    """Run all notebooks, or those named."""
    for path in sources():
        if not names or path.stem in names:
            write(render(execute(path), path.stem), path.stem)
            print(f"{path.name}: done")


if __name__ == "__main__":
    main(sys.argv[1:])
