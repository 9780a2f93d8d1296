"""Measure an exported model: accuracy against the number of image tokens that survive, and write its model card.

    python -m training.evaluate vtc/zoo/tiny-llava --card

Tokens are dropped between the projector and the language model; survivors keep their positions. The selections here are
plain references that do not use the library, so that the library can be tested against the table.
"""

from __future__ import annotations

import argparse
import json
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoProcessor, LlavaForConditionalGeneration

from training import packing
from vtc.eval.items import Item, Question, digest, majority
from vtc.eval.scenes import QUESTION_TYPES, QUESTIONS_PER_SCENE, Scene, questions

BUDGETS = (128, 64, 28, 13, 5)  # of 256: 50, 25, 11, 5 and 2 %
BATCH = 50  # scenes


@dataclass(frozen=True)
class View:
    """What a selection may look at, for B scenes with N image tokens each."""

    saliency: torch.Tensor  # (B, N): attention of [CLS] in the layer whose output the language model gets
    features: torch.Tensor  # (B, N, D): projected
    hidden: torch.Tensor  # (B, N, C): not yet projected
    owner: torch.Tensor  # (B, N): 0 is background; known to the oracle only


def view(model: LlavaForConditionalGeneration, scenes: Sequence[Scene]) -> View:
    tower = model.model.vision_tower
    states = tower(packing.pixels(scenes), output_hidden_states=True).hidden_states
    layer = tower.encoder.layers[-2]
    attention, normed = layer.self_attn, layer.layer_norm1(states[-3])  # (B, 1 + N, C)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    query, key = heads(attention.q_proj(normed[:, :1])), heads(attention.k_proj(normed))
    row = (query @ key.transpose(-1, -2) * attention.head_dim**-0.5).softmax(-1)[:, :, 0, 1:].mean(1)  # (B, N)
    hidden = states[-2][:, 1:]
    owner = torch.stack([torch.from_numpy(scene.owner.ravel()) for scene in scenes])
    return View(row, model.model.multi_modal_projector(hidden), hidden, owner)


# ----------------------------------------------------------------------------------------------------------- selections


def top(score: torch.Tensor, count: int) -> torch.Tensor:
    return score.topk(count, 1).indices


def spread(features: torch.Tensor, count: int, first: torch.Tensor | None = None) -> torch.Tensor:
    """k-center by cosine distance: always the token farthest from those taken. (B, N, D) -> (B, count).

    Without `first` (B,) it starts, like DivPrune, at the token whose nearest neighbour is farthest.
    """
    unit = functional.normalize(features, dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)  # (B, N, N)
    if first is None:
        first = (distance + 2 * torch.eye(distance.shape[1])).amin(2).argmax(1)
    taken, nearest = [first], torch.full(distance.shape[:2], torch.inf)
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, distance[torch.arange(len(first)), taken[-1]])
        taken.append(nearest.argmax(1))
    return torch.stack(taken, 1)


def pooled_spread(v: View, count: int) -> torch.Tensor:
    """k-center among the four times as many most salient tokens, from the most salient one."""
    pool = top(v.saliency, min(4 * count, v.saliency.shape[1]))
    candidates = v.hidden.gather(1, pool[..., None].expand(-1, -1, v.hidden.shape[-1]))
    return pool.gather(1, spread(candidates, count, torch.zeros(len(pool), dtype=torch.long)))


def noise(v: View, seed: int) -> torch.Tensor:
    # One generator per batch and seed, whatever has been measured before.
    return torch.rand(v.saliency.shape, generator=torch.Generator().manual_seed(seed))


def uniform(v: View, count: int) -> torch.Tensor:
    return torch.linspace(0, v.saliency.shape[1] - 1, count).round().long().expand(len(v.saliency), -1)


Select = Callable[[View, int], torch.Tensor]
SELECTIONS: dict[str, Select] = {
    "[CLS] top-k": lambda v, k: top(v.saliency, k),
    "[CLS] pool (4k) + k-center": pooled_spread,
    "k-center, hidden, from [CLS] top-1": lambda v, k: spread(v.hidden, k, v.saliency.argmax(1)),
    "k-center, projected (DivPrune)": lambda v, k: spread(v.features, k),
    "random, seed 0": lambda v, k: top(noise(v, 0), k),
    "random, seed 1": lambda v, k: top(noise(v, 1), k),
    "random, seed 2": lambda v, k: top(noise(v, 2), k),
    "uniform": uniform,
    "oracle foreground": lambda v, k: top((v.owner > 0) + 0.5 * noise(v, 3), k),
    "anti-[CLS] (least attended)": lambda v, k: top(-v.saliency, k),
}


# ---------------------------------------------------------------------------------------------------------- measurement


@dataclass
class Score:
    """Right answers of one selection at one budget."""

    right: list[bool]
    precision: list[float]  # per scene: share of kept tokens that show a thing
    coverage: list[float]  # per scene: share of things of which a token is kept

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


def batches(items: Sequence[Item]) -> Iterator[tuple[list[Scene], list[list[Item]]]]:
    groups = [list(group) for _, group in groupby(items, key=lambda item: item.index)]
    for start in range(0, len(groups), BATCH):
        part = groups[start : start + BATCH]
        yield [group[0].scene for group in part], part


@torch.inference_mode()
def measure(model: LlavaForConditionalGeneration, items: Sequence[Item]) -> dict[tuple[str, int], Score]:
    """Scores by selection and budget; the keys ("all", 256) and ("blind", 0) are there too."""
    scores: dict[tuple[str, int], Score] = {}
    for scenes, groups in batches(items):
        v = view(model, scenes)
        rows = [[Question(item.type, item.question, item.answer) for item in group] for group in groups]
        packed = packing.pack(rows, QUESTIONS_PER_SCENE)
        used = packed.types >= 0
        total = v.saliency.shape[1]
        everything = {(name, k): select(v, k).sort(1).values for k in BUDGETS for name, select in SELECTIONS.items()}
        everything["all", total] = torch.arange(total).expand(len(scenes), -1)
        everything["blind", 0] = torch.zeros(len(scenes), 0, dtype=torch.long)
        for key, kept in everything.items():
            right = packing.answer(model, packing.hidden(model, v.features, packed, kept), packed)[1]
            score = scores.setdefault(key, Score([], [], []))
            score.right += right[used].tolist()
            shown = v.owner.gather(1, kept)
            score.precision += (shown > 0).float().mean(1).nan_to_num().tolist()
            things = [len(scene.things) for scene in scenes]
            score.coverage += [len(set(row.tolist()) - {0}) / n for row, n in zip(shown, things, strict=True)]
    return scores


@torch.inference_mode()
def generated(folder: Path, model: LlavaForConditionalGeneration, items: Sequence[Item]) -> list[bool]:
    """Whether `generate` answers right, through the processor and the chat template, one question at a time."""
    processor = AutoProcessor.from_pretrained(folder)
    right = []
    for item in items:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question}]}
        prompt = processor.apply_chat_template([message], add_generation_prompt=True)
        inputs = processor(images=item.image, text=prompt, return_tensors="pt")
        tokens = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        right.append(processor.decode(tokens, skip_special_tokens=True).strip() == item.answer)
    return right


# --------------------------------------------------------------------------------------------------------------- report


def per_type(scores: dict[tuple[str, int], Score], items: Sequence[Item]) -> str:
    """Accuracy in per cent by type of question, for some of the selections."""
    columns = [("all", 256), ("blind", 0)]
    columns += [
        (name, k) for k in (128, 28) for name in ("[CLS] top-k", "k-center, projected (DivPrune)", "random, seed 0")
    ]
    rows = []
    for kind in QUESTION_TYPES:
        mine = [i for i, item in enumerate(items) if item.type == kind]
        cells = [100 * sum(scores[column].right[i] for i in mine) / max(1, len(mine)) for column in columns]
        rows.append([kind, str(len(mine)), *(f"{cell:.1f}" for cell in cells)])
    return table(["type", "questions", *(f"{name}: {k}" for name, k in columns)], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def curve(scores: dict[tuple[str, int], Score]) -> str:
    """Accuracy in per cent by selection and budget; the seeds of `random` as mean and range."""
    rows = []
    for name in SELECTIONS:
        if not name.startswith("random"):
            rows.append([name, *(f"{100 * scores[name, k].accuracy:.1f}" for k in BUDGETS)])
        elif name.endswith("0"):
            cells = []
            for k in BUDGETS:
                seeds = sorted(100 * scores[other, k].accuracy for other in SELECTIONS if other.startswith("random"))
                cells.append(f"{sum(seeds) / len(seeds):.1f} ({seeds[0]:.1f}-{seeds[-1]:.1f})")
            rows.append(["random, 3 seeds: mean (range)", *cells])
    return table(["kept", *(f"{k} ({100 * k / 256:.0f} %)" for k in BUDGETS)], rows)


def sight(scores: dict[tuple[str, int], Score]) -> str:
    """Precision and coverage of the small budgets, in per cent."""

    def cell(score: Score) -> str:
        precision, coverage = (100 * sum(part) / len(part) for part in (score.precision, score.coverage))
        return f"{precision:.0f} / {coverage:.0f}"

    rows = [[name, *(cell(scores[name, k]) for k in BUDGETS[2:])] for name in SELECTIONS if name[-1] not in "12"]
    return table(["precision / coverage", *(str(k) for k in BUDGETS[2:])], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--generate", type=int, default=100, help="questions to repeat through generate()")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--card", action="store_true", help="write README.md and accuracy.json into the folder")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = LlavaForConditionalGeneration.from_pretrained(arguments.folder, dtype=torch.float32).eval()
    items = list(questions(arguments.split, arguments.limit))
    scores = measure(model, items)
    whole, blind = scores["all", 256], scores["blind", 0]
    again = generated(arguments.folder, model, items[: arguments.generate])
    agree = sum(a == b for a, b in zip(again, whole.right, strict=False))
    fields = {
        "all": f"{100 * whole.accuracy:.1f}",
        "blind": f"{100 * blind.accuracy:.1f}",
        "majority": f"{100 * majority(items):.1f}",
        "questions": str(len(items)),
        "scenes": str(len({item.index for item in items})),
        "error": f"{100 * (whole.accuracy * (1 - whole.accuracy) / len(items)) ** 0.5:.1f}",
        "digest": digest(items),
        "curve": curve(scores),
        "sight": sight(scores),
        "types": per_type(scores, items),
        "generated": f"{sum(again)} of {len(again)}",
        "agreement": f"{agree} of {len(again)}",
    }
    print("\n\n".join(f"{name}: {value}" if "\n" not in value else value for name, value in fields.items()))
    if arguments.card:
        template = string.Template(Path(__file__).with_name("card.md").read_text())
        (arguments.folder / "README.md").write_text(template.substitute(fields))
        flat = {f"{name}@{k}": round(score.accuracy, 4) for (name, k), score in scores.items()}
        record = {"split": arguments.split, "questions": len(items), "digest": fields["digest"], "accuracy": flat}
        (arguments.folder / "accuracy.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
