"""The bundled questions as tasks for lmms-eval: a folder with YAML, JSON lines, pictures and clips."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vtc.errors import VtcError
from vtc.eval import tasks
from vtc.eval.accuracy import normalise
from vtc.eval.items import Clip, Medium

PREFIX = "vtc_"  # of the names in lmms-eval
FPS = 8  # of clips
GENERATION: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "temperature": 0}

YAML = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs:
  until: []
{generation}
process_results: !function utils.process_results
metric_list:
  - metric: exact_match
    aggregation: !function utils.mean
    higher_is_better: true
metadata:
  version: 1.0
"""
UTILS = '''\
"""Functions of the task beside this file."""

from vtc.eval.lmms.export import doc_to_text, doc_to_visual, mean, process_results

__all__ = ["doc_to_text", "doc_to_visual", "mean", "process_results"]
'''


def export(folder: Path, limit: int | None = None, names: Iterable[str] = ("scenes",), split: str = "test") -> Path:
    """Write the first `limit` questions of bundled tasks as tasks `vtc_NAME`; the folder, for `--include-path`.

    Clips become mp4 files without loss, so that a reader gives back every pixel; they need PyAV.
    """
    if folder.exists() and not folder.is_dir():
        raise VtcError(f"{folder} is a file; give a folder")
    for name in names:
        tasks.check(name)
    folder.mkdir(parents=True, exist_ok=True)
    options = "\n".join(f"  {key}: {json.dumps(value)}" for key, value in GENERATION.items())
    for name in names:
        media = folder / "media" / name
        media.mkdir(parents=True, exist_ok=True)
        lines, known = [], {}
        for item in tasks.questions(name, split, limit):
            if item.index not in known:
                known[item.index] = [
                    str(_save(medium, (media / f"{split}-{item.index:04}-{number}").resolve()))
                    for number, medium in enumerate(item.media)
                ]
            row = {"question": item.question, "answer": item.answer, "type": item.type, "media": known[item.index]}
            lines.append(json.dumps(row) + "\n")
        data = folder.resolve() / f"{name}-{split}.jsonl"
        data.write_text("".join(lines), encoding="utf-8")
        task = f"{PREFIX}{name}"
        text = YAML.format(task=task, data=json.dumps(str(data)), generation=options)
        (folder / f"{task}.yaml").write_text(text, encoding="utf-8")
    (folder / "utils.py").write_text(UTILS, encoding="utf-8")
    return folder


def _save(medium: Medium, path: Path) -> Path:
    """A picture as PNG, a clip as mp4; the file."""
    if isinstance(medium, Image.Image):
        file = path.with_suffix(".png")
        medium.save(file)
        return file
    file = path.with_suffix(".mp4")
    save_clip(medium, file)
    return file


def save_clip(clip: Clip, path: Path, fps: int = FPS) -> None:
    """Write a clip (frames, height, width, 3) uint8, both sides even, as H.264 without loss.

    Raises:
        VtcError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise VtcError("writing clips needs PyAV: pip install av") from error
    with av.open(str(path), "w") as file:
        # The usual colours of H.264 would round red, green and blue.
        stream = file.add_stream("libx264rgb", rate=fps, options={"qp": "0"})
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "rgb24"
        for frame in clip:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        file.mux(stream.encode())


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image | str]:
    """The media of a document: pictures, and the paths of clips."""
    return [path if path.endswith(".mp4") else _picture(path) for path in doc["media"]]


def _picture(path: str) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def doc_to_text(doc: dict[str, Any]) -> str:
    """The question of a document."""
    return doc["question"]


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Right or wrong, as `vtc bench` has it."""
    return {"exact_match": float(normalise(results[0]) == normalise(doc["answer"]))}


def mean(values: Sequence[float]) -> float:
    """The share of right answers."""
    return sum(values) / len(values)
