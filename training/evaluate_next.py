"""Measure `tiny-llava-next`: accuracy against the number of visual tokens that survive, and write its model card.

    python -m training.evaluate_next vtc/zoo/tiny-llava-next --card

A poster is encoded once per strategy. The strategy chooses through the library, and the questions about the poster are
answered behind what it left, at its old positions. A part of them is repeated through `vtc.compress` and `generate`.
"""

from __future__ import annotations

import argparse
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaNextForConditionalGeneration

import vtc
from training import packing
from training.evaluate import table
from training.tiny_llava_next import SIDE, hidden, layout, owners
from vtc.compressor import Compressor, as_compressors
from vtc.eval import accuracy, posters
from vtc.eval.items import Item, Question, digest, majority
from vtc.eval.posters import QUESTION_TYPES
from vtc.selection import Selection
from vtc.visual import Encoder, Visual

KEEPS = (0.5, 0.25, 0.11, 0.05, 0.02)
SEEDS = range(3)
Groups = tuple[tuple[str, ...], ...]
# The strategies of a group read the same of the encoder and share a pass. The first reads [CLS] in the feature layer.
GROUPS: Groups = (
    ("fastervlm", "divprune", "uniform", "pool", *(f"random:seed={seed}" for seed in SEEDS)),
    ("globalcom2", "globalcom2:formula=zscore", "todre"),
    ("globalcom2:formula=code",),
)


def spec(name: str, keep: float) -> str:
    return f"{name}{',' if ':' in name else ':'}keep={keep}"


@dataclass(kw_only=True)
class Spy(Compressor):
    """Notes what the strategies of a group would keep. It keeps most itself: with all tokens it would not be asked."""

    name = "spy"
    keep: int | float = 0.9
    strategies: dict = field(default_factory=dict)
    chosen: dict = field(default_factory=dict)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"features"}).union(*(strategy.needs for strategy in self.strategies.values()))

    def layers(self, encoder: Encoder) -> tuple[int, ...]:
        (layers,) = {strategy.layers(encoder) for strategy in self.strategies.values()}
        return layers

    def select(self, visual: Visual) -> Selection:
        self.chosen = {key: strategy.select(visual) for key, strategy in self.strategies.items()}
        self.features = visual.features
        self.saliency = visual.saliency if "cls" in self.needs else None
        return Selection.keep(torch.arange(self.budget(visual.layout))[None], visual.layout.tokens)


@dataclass
class Score:
    """Right answers of one setting; for a selection also what it saw, per poster."""

    right: list[bool] = field(default_factory=list)
    precision: list[float] = field(default_factory=list)  # share of kept tokens that show a thing
    coverage: list[float] = field(default_factory=list)  # share of things of which a token is kept

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


Scores = dict[tuple[str, float], Score]


class Measurement:
    """All scores, by (strategy, keep)."""

    def __init__(
        self,
        model: LlavaNextForConditionalGeneration,
        processor: Any,
        groups: Groups = GROUPS,
        keeps: Sequence[float] = KEEPS,
    ) -> None:
        self.model, self.processor, self.keeps = model, processor, keeps
        self.spies = [
            Spy(strategies={(name, keep): as_compressors(spec(name, keep))[0] for name in names for keep in keeps})
            for names in groups
        ]
        self.scores: Scores = {}

    @torch.inference_mode()
    def poster(self, group: Sequence[Item], curve: bool = True) -> None:
        """All questions about one poster; without `curve` only with all tokens, none, and parts of the picture."""
        inputs = accuracy.process(self.processor, [group[0].question], [group[0].media])
        rows = [[Question(item.type, item.question, item.answer) for item in group]]
        packed = packing.pack(rows, len(group), types=QUESTION_TYPES)
        place = layout(*group[0].scene.image.shape[:2]).order  # (N,)
        patches = torch.from_numpy(owners(group[0].scene)[0]).flatten()
        owner = torch.cat([patches, patches.new_zeros(1)])[place]  # (N,): the newline shows nothing
        for spy in self.spies if curve else self.spies[:1]:
            spy.chosen = {}
            with vtc.compress(self.model, spy):
                self.model.model(**inputs)
            if not spy.chosen:
                raise RuntimeError("no strategy was asked")
            for key, selection in spy.chosen.items() if curve else ():
                self.note(key, packed, selection, spy.features[0], owner)
        features, total = self.spies[0].features[0], len(place)
        everything = torch.arange(total)
        parts = {"all": everything, "blind": everything[:0]}
        parts |= {"thumbnail": everything[: SIDE**2], "crops": everything[SIDE**2 :]}
        for name, kept in parts.items():
            self.note((name, 0), packed, Selection.keep(kept[None], total), features, owner)
        saliency = self.spies[0].saliency[0, 0].masked_fill(place == place.max(), torch.inf)  # newlines have none
        noise = torch.rand(total, generator=torch.Generator().manual_seed(0))
        for keep in self.keeps if curve else ():
            for name, order in (("oracle foreground", (owner > 0) + 0.5 * noise), ("anti-[CLS]", -saliency)):
                kept = order.topk(max(1, int(total * keep + 0.5))).indices
                self.note((name, keep), packed, Selection.keep(kept[None], total), features, owner)

    def note(
        self,
        key: tuple[str, float],
        packed: packing.Pack,
        selection: Selection,
        features: torch.Tensor,
        owner: torch.Tensor,
    ) -> None:
        """Answer behind the survivors `selection` leaves of `features` (N, D)."""
        kept = selection.index[0]
        left = features.clone()
        left[kept] = selection.apply(features[None])[0]
        right = packing.answer(self.model, hidden(self.model, left, packed, kept), packed)[1]
        score = self.scores.setdefault(key, Score())
        score.right += right[packed.types >= 0].tolist()
        shown = owner[kept]
        score.precision.append((shown > 0).float().mean().nan_to_num().item())
        score.coverage.append(len(set(shown.tolist()) - {0}) / max(1, len(set(owner.tolist()) - {0})))


@torch.inference_mode()
def generated(model: LlavaNextForConditionalGeneration, processor: Any, items: Sequence[Item]) -> list[bool]:
    """Whether `generate` answers right, through the processor and the chat template, one question at a time."""
    right = []
    for item in items:
        inputs = accuracy.process(processor, [item.question], [item.media])
        tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        right.append(accuracy.right(processor.batch_decode(tokens, skip_special_tokens=True)[0], item))
    return right


# --------------------------------------------------------------------------------------------------------------- report


def lines() -> list[str]:
    """The lines of the tables: informed strategies, baselines, references."""
    names = sorted({name.split(":seed")[0] for group in GROUPS for name in group} - {"uniform", "pool", "random"})
    return [*names, "random", "uniform", "pool", "oracle foreground", "anti-[CLS]"]


def label(name: str) -> str:
    return name if " " in name or "[" in name else f"`{name}`"


def curve(scores: Scores) -> str:
    """Accuracy in per cent by strategy and keep; the seeds of `random` as mean and range."""
    rows = []
    for name in lines():
        if name == "random":
            cells = []
            for keep in KEEPS:
                seeds = sorted(100 * scores[f"random:seed={seed}", keep].accuracy for seed in SEEDS)
                cells.append(f"{sum(seeds) / len(seeds):.1f} ({seeds[0]:.1f}-{seeds[-1]:.1f})")
            rows.append(["`random`, 3 seeds: mean (range)", *cells])
        else:
            rows.append([label(name), *(f"{100 * scores[name, keep].accuracy:.1f}" for keep in KEEPS)])
    return table(["keep", *(f"{100 * keep:.0f} %" for keep in KEEPS)], rows)


def sight(scores: Scores) -> str:
    """Precision and coverage, in per cent."""

    def cell(score: Score) -> str:
        precision, coverage = (100 * sum(part) / len(part) for part in (score.precision, score.coverage))
        return f"{precision:.0f} / {coverage:.0f}"

    names = ["random:seed=0" if name == "random" else name for name in lines() if name != "pool"]
    rows = [[label(name), *(cell(scores[name, keep]) for keep in KEEPS)] for name in names]
    return table(["precision / coverage", *(f"{100 * keep:.0f} %" for keep in KEEPS)], rows)


def per_type(scores: Scores, items: Sequence[Item], columns: Sequence[tuple[str, float]]) -> str:
    """Accuracy in per cent by type of question."""
    rows = []
    for kind in QUESTION_TYPES:
        mine = [i for i, item in enumerate(items) if item.type == kind]
        cells = [100 * sum(scores[column].right[i] for i in mine) / max(1, len(mine)) for column in columns]
        rows.append([kind, str(len(mine)), *(f"{cell:.1f}" for cell in cells)])
    return table(["type", "questions", *(f"{name} {100 * k:.0f} %" if k else name for name, k in columns)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, default=None, help="questions; by default the whole set")
    parser.add_argument("--curve", type=int, default=None, help="questions for the curve; by default all")
    parser.add_argument("--generate", type=int, default=100, help="questions to repeat through generate()")
    parser.add_argument("--card", action="store_true", help="write README.md and accuracy.json into the folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = vtc.zoo.load(str(arguments.folder))
    items = list(posters.questions(arguments.split, arguments.limit))
    most = len(items) if arguments.curve is None else arguments.curve
    measurement, done = Measurement(model, processor), 0
    for _, some in groupby(items, key=lambda item: item.index):
        group = list(some)
        measurement.poster(group, curve=done + len(group) <= most)
        done += len(group)
    scores = measurement.scores
    counted = len(scores["fastervlm", KEEPS[0]].right)
    whole = scores["all", 0]
    again = generated(model, processor, items[: arguments.generate])
    agree = sum(a == b for a, b in zip(again, whole.right, strict=False))
    parts = [("all", 0), ("blind", 0), ("thumbnail", 0), ("crops", 0)]
    chosen = [(name, keep) for keep in (0.25, 0.05) for name in ("globalcom2", "divprune", "random:seed=0")]
    error = (whole.accuracy * (1 - whole.accuracy) / len(items)) ** 0.5
    fields = {
        **{name: f"{100 * scores[name, 0].accuracy:.1f}" for name, _ in parts},
        "majority": f"{100 * majority(items):.1f}",
        "questions": str(len(items)),
        "posters": str(len({item.index for item in items})),
        "counted": str(counted),
        "error": f"{100 * error:.1f}",
        "digest": digest(items),
        "curve": curve(scores),
        "sight": sight(scores),
        "types": per_type(scores, items, parts),
        "typed": per_type(scores, items[:counted], [("all", 0), *chosen]),
        "generated": f"{sum(again)} of {len(again)}",
        "agreement": f"{agree} of {len(again)}",
    }
    print("\n\n".join(f"{name}: {value}" if "\n" not in value else value for name, value in fields.items()))
    if arguments.card:
        template = string.Template(Path(__file__).with_name("card_next.md").read_text())
        (arguments.folder / "README.md").write_text(template.substitute(fields))
        flat = {f"{name}@{k}" if k else name: round(score.accuracy, 4) for (name, k), score in scores.items()}
        record = {"split": arguments.split, "questions": len(items), "curve_questions": counted,
                  "digest": fields["digest"], "accuracy": flat}  # fmt: skip
        (arguments.folder / "accuracy.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
