"""Measure the exported `tiny-onevision` under the strategies of the library, and write its model card.

    python -m training.evaluate_onevision vtc/zoo/tiny-onevision --card

All tokens and none are measured on the whole test set, the curve on its first `--limit` questions; every answer comes
from `generate`, through processor and chat template. Needs torchvision, as the processor does.
"""

from __future__ import annotations

import argparse
import json
import string
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import vtc
from vtc.eval import accuracy
from vtc.eval.clips import MOVING_TYPES, QUESTION_TYPES, STILL_TYPES, questions
from vtc.eval.items import Item, digest, majority

KEEPS = {"original": (0.5, 0.25, 0.1, 0.05, 0.025), "contiguous": (0.25, 0.05)}  # by positions of the survivors
STRATEGIES = {
    "holitom": "holitom",
    "fastervlm (`saliency=received`)": "fastervlm:saliency=received",
    "todre (`pivot=received`)": "todre:pivot=received",
    "divprune": "divprune",
    "fastv": "fastv",
    "random, seed 0": "random:seed=0",
    "random, seed 1": "random:seed=1",
    "random, seed 2": "random:seed=2",
    "uniform": "uniform",
    "pool": "pool",
}
BATCH = 20
BLIND = "blind"

Right = list[bool]


def spec(strategy: str, keep: float, positions: str) -> str:
    head = STRATEGIES[strategy]
    return f"{head}{',' if ':' in head else ':'}keep={keep},positions={positions}"


class Judge:
    """The model and the questions, prepared once per process."""

    def __init__(self, folder: Path, split: str, limit: int | None) -> None:
        torch.set_num_threads(1)
        self.model, self.processor = vtc.zoo.load(str(folder))
        self.items = list(questions(split, limit))
        self.words = accuracy.longest_answer(self.processor, self.items)
        self.prepared: dict[bool, list[accuracy.Batch]] = {}

    def right(self, what: str) -> Right:
        """Which questions are answered right under a spec, or without seeing anything."""
        blind = what == BLIND
        if blind not in self.prepared:
            self.prepared[blind] = accuracy.batches(self.processor, self.items, BATCH, blind=blind)
        with vtc.compress(self.model, "none" if blind else what):
            answers = accuracy.answer(self.model, self.processor, self.prepared[blind], self.words)
        return [accuracy.right(answer, item) for answer, item in zip(answers, self.items, strict=True)]


_judge: list[Judge] = []


def _prepare(*arguments: Any) -> None:
    _judge.append(Judge(*arguments))


def _right(what: str) -> Right:
    return _judge[0].right(what)


def measure(folder: Path, split: str, limit: int | None, specs: Sequence[str], workers: int) -> dict[str, Right]:
    """Which of the first `limit` questions are answered right, per spec."""
    with ProcessPoolExecutor(workers, get_context("spawn"), _prepare, (folder, split, limit)) as pool:
        found = {}
        for name, right in zip(specs, pool.map(_right, specs), strict=True):
            found[name] = right
            print(f"{name}: {percent(right)}", flush=True)
        return found


# --------------------------------------------------------------------------------------------------------------- report


def percent(right: Iterable[bool]) -> str:
    some = list(right)
    return f"{100 * sum(some) / max(1, len(some)):.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def curve(found: dict[str, Right], positions: str) -> str:
    rows = []
    for name in STRATEGIES:
        if name.startswith("random"):
            if not name.endswith("0"):
                continue
            cells = []
            for keep in KEEPS[positions]:
                seeds = [found[spec(f"random, seed {seed}", keep, positions)] for seed in range(3)]
                shares = sorted(100 * sum(right) / len(right) for right in seeds)
                cells.append(f"{sum(shares) / 3:.1f} ({shares[0]:.1f}-{shares[-1]:.1f})")
            rows.append(["random, 3 seeds: mean (range)", *cells])
        else:
            rows.append([name, *(percent(found[spec(name, keep, positions)]) for keep in KEEPS[positions])])
    return table(["kept", *(f"{100 * keep:g} %" for keep in KEEPS[positions])], rows)


def by_type(items: Sequence[Item], columns: dict[str, Right]) -> str:
    """Accuracy in per cent by type, and of the types that need time together and of those that do not."""
    groups = {kind: (kind,) for kind in QUESTION_TYPES}
    groups |= {"**in time**": MOVING_TYPES, "**not in time**": STILL_TYPES}
    rows = []
    for name, kinds in groups.items():
        mine = [i for i, item in enumerate(items) if item.type in kinds]
        rows.append([name, str(len(mine)), *(percent(right[i] for i in mine) for right in columns.values())])
    return table(["type", "questions", *columns], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, default=500, help="questions behind the curve")
    parser.add_argument("--workers", type=int, default=1, help="processes with one thread each")
    parser.add_argument("--card", action="store_true", help="write README.md and accuracy.json into the folder")
    arguments = parser.parse_args()
    items = list(questions(arguments.split))
    part = items[: arguments.limit]
    whole = measure(arguments.folder, arguments.split, None, ["none", BLIND], arguments.workers)
    specs = [spec(name, keep, positions) for positions in KEEPS for keep in KEEPS[positions] for name in STRATEGIES]
    found = measure(arguments.folder, arguments.split, arguments.limit, specs, arguments.workers)
    full = sum(whole["none"]) / len(items)
    shown = {
        f"{name.split(' ')[0].strip(',')}, {100 * keep:g} %": found[spec(name, keep, "original")]
        for keep in (0.25, 0.05)
        for name in ("holitom", "fastervlm (`saliency=received`)", "divprune", "uniform", "random, seed 0")
    }
    fields = {
        "all": percent(whole["none"]),
        "blind": percent(whole[BLIND]),
        "majority": f"{100 * majority(items):.1f}",
        "questions": str(len(items)),
        "scenes": str(len({item.index for item in items})),
        "error": f"{100 * (full * (1 - full) / len(items)) ** 0.5:.1f}",
        "digest": digest(items),
        "limit": str(len(part)),
        "part": percent(whole["none"][: len(part)]),
        "original": curve(found, "original"),
        "contiguous": curve(found, "contiguous"),
        "types": by_type(items, {"all tokens": whole["none"], "blind": whole[BLIND]}),
        "lost": by_type(part, {"all": whole["none"][: len(part)], **shown}),
    }
    print("\n\n".join(f"{name}: {value}" if "\n" not in value else value for name, value in fields.items()))
    if arguments.card:
        template = string.Template(Path(__file__).with_name("card_onevision.md").read_text())
        (arguments.folder / "README.md").write_text(template.substitute(fields))
        flat = {name: round(sum(right) / len(right), 4) for name, right in found.items()}
        record = {
            "split": arguments.split,
            "questions": len(items),
            "digest": fields["digest"],
            "all": round(full, 4),
            "blind": round(sum(whole[BLIND]) / len(items), 4),
            "curve_questions": len(part),
            "curve": flat,
        }
        (arguments.folder / "accuracy.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
