"""The bundled questions as a task for lmms-eval: a folder with YAML, pictures and JSON lines, made from `scenes`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vtc.errors import VtcError
from vtc.eval import scenes
from vtc.eval.accuracy import normalise

TASK = "vtc_scenes"
GENERATION: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "temperature": 0}

YAML = f"""\
task: {TASK}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {{data}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs:
  until: []
{{generation}}
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


def export(folder: Path, limit: int | None = None, split: str = "test") -> Path:
    """Write the first `limit` questions of a split as the task `vtc_scenes`; the folder, for `--include-path`."""
    if folder.exists() and not folder.is_dir():
        raise VtcError(f"{folder} is a file; give a folder")
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    lines = []
    for item in scenes.questions(split, limit):
        picture = (pictures / f"{split}-{item.index:04}.png").resolve()
        if not picture.exists():
            item.image.save(picture)
        row = {"question": item.question, "answer": item.answer, "type": item.type, "image": str(picture)}
        lines.append(json.dumps(row) + "\n")
    data = folder.resolve() / f"{split}.jsonl"
    data.write_text("".join(lines), encoding="utf-8")
    options = "\n".join(f"  {name}: {json.dumps(value)}" for name, value in GENERATION.items())
    (folder / f"{TASK}.yaml").write_text(YAML.format(data=json.dumps(str(data)), generation=options), encoding="utf-8")
    (folder / "utils.py").write_text(UTILS, encoding="utf-8")
    return folder


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The picture of a document."""
    with Image.open(doc["image"]) as picture:
        return [picture.convert("RGB")]


def doc_to_text(doc: dict[str, Any]) -> str:
    """The question of a document."""
    return doc["question"]


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Right or wrong, as `vtc bench` has it."""
    return {"exact_match": float(normalise(results[0]) == normalise(doc["answer"]))}


def mean(values: Sequence[float]) -> float:
    """The share of right answers."""
    return sum(values) / len(values)
