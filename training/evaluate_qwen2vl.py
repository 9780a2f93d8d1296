"""Measure `tiny-qwen2vl`: accuracy against the share of visual tokens that survive, and write its model card.

    python -m training.evaluate_qwen2vl vtc/zoo/tiny-qwen2vl --card --workers 2

Everything goes through processor, chat template and `generate`, compressed by the library; only the test of coordinates
calls the parts of the model itself.
"""

from __future__ import annotations

import argparse
import functools
import json
import string
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import vtc
from vtc.eval import accuracy, sizes
from vtc.eval.items import Item, Medium, Question, digest, majority

KEEPS = (0.5, 0.25, 0.11, 0.05)
SPECS = {
    "fastervlm, `saliency=received`": ["fastervlm:saliency=received"],
    "divprune": ["divprune"],
    "todre, `pivot=received`": ["todre:pivot=received"],
    "holitom": ["holitom"],
    "fastv": ["fastv"],
    "random, 3 seeds": [f"random:seed={seed}" for seed in range(3)],
    "uniform": ["uniform"],
    "pool": ["pool"],
}
BATCH = 40


@dataclass(frozen=True)
class Setting:
    """One measurement: a compressor, or none, on media as they are, left out or at half their size."""

    spec: str = "none"
    media: str = "whole"  # or "none", "half"

    @property
    def key(self) -> str:
        return self.spec if self.media == "whole" else self.media


def halved(medium: Medium) -> Medium:
    """Half as wide and high."""
    if isinstance(medium, Image.Image):
        return medium.resize((medium.width // 2, medium.height // 2), Image.Resampling.LANCZOS)
    return np.stack([np.asarray(halved(Image.fromarray(frame))) for frame in medium])


@functools.cache
def prepared(folder: Path, limit: int | None, media: str) -> tuple[Any, Any, list[Item], list[accuracy.Batch]]:
    """Model, processor, the first `limit` questions and their inputs; each process makes them once."""
    torch.set_num_threads(1)
    model, processor = vtc.zoo.load(str(folder))
    items = list(sizes.questions("test", limit))
    if media == "half":
        small = {item.index: tuple(map(halved, item.media)) for item in items}
        items = [replace(item, media=small[item.index]) for item in items]
    return model, processor, items, accuracy.batches(processor, items, BATCH, blind=media == "none")


def measure(folder: Path, limit: int | None, setting: Setting) -> tuple[list[str], float]:
    """The answers to the first `limit` questions, and the mean number of visual tokens of a prompt."""
    model, processor, items, batches = prepared(folder, limit, setting.media)
    with vtc.compress(model, setting.spec):
        answers = accuracy.answer(model, processor, batches, accuracy.longest_answer(processor, items))
    pads = torch.tensor([processor.image_token_id, processor.video_token_id])
    return answers, sum(int(torch.isin(batch.inputs["input_ids"], pads).sum()) for batch in batches) / len(items)


@torch.inference_mode()
def coordinates(folder: Path, limit: int | None, flat: bool) -> dict[str, float]:
    """Accuracy per type of question; with `flat` the visual tokens lose rows and columns and are numbered in a line."""
    torch.set_num_threads(1)
    model, _ = vtc.zoo.load(str(folder))  # before the imports: it makes torchvision importable
    from training import packing, tiny_qwen2vl

    right: dict[str, list[bool]] = {}
    for _, group in groupby(sizes.questions("test", limit), key=lambda item: item.index):
        asked = list(group)
        scene = asked[0].scene
        pixels = tiny_qwen2vl.patches([scene])
        rows, columns = (side // sizes.PATCH for side in scene.frames.shape[1:3])
        states = tiny_qwen2vl.look(model.model.visual, pixels.flatten(0, 1), rows, columns)
        tokens = model.model.visual.merger(states[-1].flatten(0, 1))[None]
        questions = [Question(item.type, item.question, item.answer) for item in asked]
        packed = packing.pack([questions], len(asked), tiny_qwen2vl.LANGUAGE, sizes.QUESTION_TYPES)
        grid = (pixels.shape[1], rows // tiny_qwen2vl.MERGE, columns // tiny_qwen2vl.MERGE)
        hidden = tiny_qwen2vl.answers(model, tokens, grid, packed, line=flat)
        for item, good in zip(asked, packing.answer(model, hidden, packed)[1][0].tolist(), strict=False):
            right.setdefault(item.type, []).append(good)
    return {kind: sum(good) / len(good) for kind, good in right.items()}


# --------------------------------------------------------------------------------------------------------------- report


def with_keep(spec: str, keep: float) -> str:
    return f"{spec}{',' if ':' in spec else ':'}keep={keep}"


def settings() -> list[Setting]:
    kept = [Setting(with_keep(spec, keep)) for specs in SPECS.values() for spec in specs for keep in KEEPS]
    return [*kept, Setting(media="half")]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


@dataclass
class Results:
    """Accuracy by the key of a setting: of all questions under "all", and by type."""

    items: Sequence[Item]
    by_key: dict[str, dict[str, float]]

    def add(self, key: str, answers: Sequence[str]) -> None:
        total, kinds = accuracy.score(answers, self.items[: len(answers)])
        self.by_key[key] = {"all": total.accuracy, **{kind: score.accuracy for kind, score in kinds.items()}}

    def curve(self) -> str:
        rows = []
        for name, specs in SPECS.items():
            cells = []
            for keep in KEEPS:
                seeds = [100 * self.by_key[with_keep(spec, keep)]["all"] for spec in specs]
                spread = f" ({min(seeds):.1f}-{max(seeds):.1f})" if len(seeds) > 1 else ""
                cells.append(f"{sum(seeds) / len(seeds):.1f}{spread}")
            rows.append([name, *cells])
        return table(["kept", *(f"{100 * keep:.0f} %" for keep in KEEPS)], rows)

    def per_type(self, keys: dict[str, str]) -> str:
        kinds = [kind for kind in sizes.QUESTION_TYPES if kind in self.by_key["none"]]
        rows = []
        for kind in (*kinds, "all"):
            asked = sum(item.type == kind or kind == "all" for item in self.items)
            rows.append([kind, str(asked), *(f"{100 * self.by_key[key][kind]:.1f}" for key in keys.values())])
        return table(["type", "questions", *keys], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=None, help="questions behind the first two numbers")
    parser.add_argument("--curve", type=int, default=1000, help="questions behind the curve")
    parser.add_argument("--workers", type=int, default=1, help="processes with one thread each")
    parser.add_argument("--card", action="store_true", help="write README.md and accuracy.json into the folder")
    arguments = parser.parse_args()
    folder, limit, few = arguments.folder, arguments.limit, arguments.curve
    items = list(sizes.questions("test", limit))
    whole, part = Results(items, {}), Results(items[:few], {})
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        first = [pool.submit(measure, folder, limit, Setting(media=media)) for media in ("whole", "none")]
        rest = {setting: pool.submit(measure, folder, few, setting) for setting in settings()}
        lines = {flat: pool.submit(coordinates, folder, limit, flat) for flat in (False, True)}
        (answers, tokens), (blind, _) = (job.result() for job in first)
        whole.add("none", answers)
        whole.add("blind", blind)
        part.add("none", answers[:few])
        print({key: round(100 * scores["all"], 1) for key, scores in whole.by_key.items()}, flush=True)
        for setting, job in rest.items():
            part.add(setting.key, job.result()[0])
            print(setting.key, round(100 * part.by_key[setting.key]["all"], 1), flush=True)
        small = rest[Setting(media="half")].result()[1]
        for flat, job in lines.items():
            whole.by_key["line" if flat else "grid"] = job.result()
    share = whole.by_key["none"]["all"]
    shown = {"all tokens": "none", "blind": "blind", "in a line": "line"}
    kept = {"all tokens": "none", "half size": "half"}
    kept |= {f"{name}: {100 * k:.0f} %": f"{name}:keep={k}" for k in (0.25, 0.11) for name in ("divprune", "fastv")}
    kept |= {f"random, seed 0: {100 * k:.0f} %": f"random:seed=0,keep={k}" for k in (0.25, 0.11)}
    for scores in whole.by_key.values():
        kinds = [scores[item.type] for item in items]
        scores.setdefault("all", sum(kinds) / len(kinds))
    fields = {
        "all": f"{100 * share:.1f}",
        "blind": f"{100 * whole.by_key['blind']['all']:.1f}",
        "majority": f"{100 * majority(items):.1f}",
        "questions": str(len(items)),
        "media": str(len({item.index for item in items})),
        "clips": str(len({item.index for item in items if item.clips})),
        "error": f"{100 * (share * (1 - share) / len(items)) ** 0.5:.1f}",
        "digest": digest(items),
        "few": str(min(few, len(items))),
        "few_error": f"{100 * (share * (1 - share) / few) ** 0.5:.1f}",
        "tokens": f"{tokens:.0f}",
        "small_tokens": f"{small:.0f}",
        "curve": part.curve(),
        "types": whole.per_type(shown),
        "kept": part.per_type(kept),
    }
    print("\n\n".join(f"{name}: {value}" if "\n" not in value else value for name, value in fields.items()))
    if arguments.card:
        template = string.Template(Path(__file__).with_name("card_qwen2vl.md").read_text())
        (folder / "README.md").write_text(template.substitute(fields))
        record = {
            "split": "test",
            "digest": fields["digest"],
            "questions": {"first": len(items), "curve": len(part.items)},
            "first": whole.by_key,
            "curve": part.by_key,
        }
        (folder / "accuracy.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
