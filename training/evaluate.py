"""Measure a bundled model under the strategies, and write its card.

    python -m training.evaluate tiny-llava --card

Every answer comes from `generate`, through processor and chat template, as in `vtc bench`. What is measured is told in
`cards.py`. Each setting leaves a line in runs/NAME/, and is not measured again for the same weights and questions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import string
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from training import cards
from training.cards import BLIND, CARDS, NONE, Result, Results
from training.gauges import Foreground
from vtc import adapters, zoo
from vtc.eval import accuracy, lines, tasks
from vtc.eval.bench import SPLIT
from vtc.eval.items import Item, digest, majority
from vtc.eval.plan import DOWNSAMPLE, Setting
from vtc.eval.prompts import Asked

BATCH = 50


class Questions:
    """The first `limit` questions for a bundled model, to be asked under one setting after the other."""

    def __init__(self, name: str, limit: int | None = None) -> None:
        self.model, self.processor = zoo.load(name)
        self.items: list[Item] = list(tasks.questions(tasks.task_of(name), SPLIT, limit))
        self.prompts = Asked(self.model, self.processor, self.items, BATCH)
        shown = CARDS[name].shown
        self.owners = {} if shown is None else {item.index: shown(item) for item in self.items}  # (N,) each

    @cached_property
    def _usual(self) -> list[accuracy.Batch]:
        return self.prompts.batches(NONE)

    def measure(self, setting: Setting) -> Result:
        """Ask all of them."""
        other = setting.blind or setting.scaled is not None
        batches = self.prompts.batches(setting) if other else self._usual
        tokens = 0
        sights: dict[int, tuple[float, float]] = {}

        def told() -> Iterator[accuracy.Batch]:
            for batch in batches:
                for one in setting.compressors:
                    if isinstance(one, Foreground):
                        one.shows(torch.stack([self.owners[picture] for picture in batch.pictures]))
                yield batch

        with setting.on(self.model) as session:

            def done(batch: accuracy.Batch) -> None:
                nonlocal tokens
                visual = adapters.find(self.model).placeholders(batch.inputs["input_ids"], None)  # (B, S) each
                tokens += sum(int(mask.sum()) for mask in visual.values())
                if self.owners and setting.compressors:
                    report = session.last
                    for picture, kept, merged in zip(batch.pictures, report.kept, report.sources, strict=True):
                        if merged is None:
                            sights[picture] = sight(self.owners[picture], kept)

            words = accuracy.longest_answer(self.processor, self.items)
            answers = accuracy.answer(self.model, self.processor, told(), words, done)
        right = [accuracy.right(answer, item) for answer, item in zip(answers, self.items, strict=True)]
        return Result(right, tokens / len(right), *(mean(part) for part in zip(*sights.values(), strict=True)))


def sight(owner: torch.Tensor, kept: Sequence[int]) -> tuple[float, float]:
    """Precision and coverage of the kept tokens of one medium, of which `owner` (N,) tells what they show."""
    seen = owner[list(kept)]
    things = len(owner[owner > 0].unique())
    return (seen > 0).float().mean().item(), len(seen[seen > 0].unique()) / max(1, things)


def measure(questions: Questions, settings: Sequence[Setting], path: Path) -> Results:
    """The results under all settings: those that `path` has, and the others, which are added to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    known = {row.pop("spec"): Result(**row) for _, row in lines.read(path)} if path.stat().st_size else {}
    with path.open("a", encoding="utf-8") as file:
        for setting in settings:
            if setting.spec not in known:
                known[setting.spec] = result = questions.measure(setting)
                lines.append(file, [{"spec": setting.spec, **asdict(result)}])
            print(f"{setting.spec}: {cards.percent(known[setting.spec].right)}", flush=True)
    return known


def evaluate(name: str, limit: int | None, out: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """What the card has to tell, by the names in its text, and all accuracies."""
    card = CARDS[name]
    weights = hashlib.sha256((zoo.find(name) / "model.safetensors").read_bytes())

    def found(limit: int | None, settings: Sequence[Setting]) -> tuple[list[Item], Results]:
        questions = Questions(name, limit)
        asked = hashlib.sha256(weights.digest() + digest(questions.items).encode()).hexdigest()
        return questions.items, measure(questions, settings, out / f"answers-{asked[:8]}.jsonl")

    items, whole = found(limit, card.whole())
    few, curve = found(min(filter(None, (limit, card.few)), default=None), card.curve())
    everything = whole[NONE.spec]
    part = everything.first(len(few))
    columns = {"all tokens": everything, "blind": whole[BLIND.spec]} | {one.spec: whole[one.spec] for one in card.parts}
    fields = {
        **{name.replace(" ", "_"): cards.percent(result.right) for name, result in columns.items()},
        "majority": f"{100 * majority(items):.1f}",
        "questions": str(len(items)),
        "media": str(len({item.index for item in items})),
        "clips": str(len({item.index for item in items if item.clips})),
        "tokens": f"{everything.tokens:.0f}",
        "error": cards.error(everything.right),
        "digest": digest(items),
        "few": str(len(few)),
        "few_all": cards.percent(part.right),
        "few_error": cards.error(part.right),
        "types": cards.types(card, items, {name: [result] for name, result in columns.items()}),
        "curve": cards.curve(card, curve),
        "contiguous": cards.curve(card, curve, "contiguous"),
        "sight": cards.sight(card, curve),
        "chosen": cards.chosen(card, few, part, curve),
    }
    if DOWNSAMPLE in card.strategies:
        fields["small_tokens"] = f"{curve[Setting(DOWNSAMPLE, scaled=0.25).spec].tokens:.0f}"
    record = {
        "split": SPLIT,
        "digest": fields["digest"],
        "questions": {"whole": len(items), "curve": len(few)},
        "whole": {one.spec: scores(whole[one.spec], items) for one in card.whole()},
        "curve": {one.spec: scores(curve[one.spec], few) for one in card.curve()},
    }
    return fields, record


def scores(result: Result, items: Sequence[Item]) -> dict[str, float]:
    """Accuracy over all questions, and by type."""
    kinds = {"all": result.right}
    for item, good in zip(items, result.right, strict=True):
        kinds.setdefault(item.type, []).append(good)
    return {kind: round(mean(right), 4) for kind, right in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CARDS)
    parser.add_argument("--limit", type=int, help="only the first questions, to try it out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--card", action="store_true", help="write README.md and accuracy.json into vtc/zoo/NAME")
    arguments = parser.parse_args()
    if arguments.card and arguments.limit is not None:
        parser.error("a card is about the whole test set: leave --limit out")
    torch.set_num_threads(arguments.threads)
    fields, record = evaluate(arguments.name, arguments.limit, Path("runs", arguments.name))
    print("\n\n".join(f"{name}: {value}" if "\n" not in value else value for name, value in fields.items()))
    if arguments.card:
        text = Path(__file__).with_name("cards") / f"{arguments.name}.md"
        folder = zoo.find(arguments.name)
        (folder / "README.md").write_text(string.Template(text.read_text()).substitute(fields))
        (folder / "accuracy.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
