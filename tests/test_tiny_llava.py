"""What the bundled model has to show for a comparison on it to mean anything; figures are in its model card."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import vtc
from vtc.eval import accuracy, scenes
from vtc.eval.items import digest

FOLDER = Path(vtc.__file__).parent / "zoo" / "tiny-llava"
QUESTIONS = 400  # of the test split; the standard error of a share is at most 2.5 points


@dataclass(kw_only=True)
class LeastAttended(vtc.Scorer):
    """Keep what [CLS] attends to least: what can be answered from that has leaked into the background."""

    needs = frozenset({"cls"})

    def score(self, visual: vtc.Visual) -> Tensor:
        return -visual.saliency[:, 0]


@pytest.fixture(scope="module")
def share() -> Callable[..., float]:
    """Share of right answers under one compressor or, given several, their mean."""
    model, processor = vtc.zoo.load("tiny-llava")
    items = list(scenes.questions("test", QUESTIONS))
    prepared = accuracy.batches(processor, items, 50)
    words = accuracy.longest_answer(processor, items)

    known: dict[tuple[str, bool], float] = {}

    def one(spec: Any, blind: bool) -> float:
        if (str(spec), blind) not in known:
            with vtc.compress(model, spec):
                batches = accuracy.batches(processor, items, 50, blind=True) if blind else prepared
                answers = accuracy.answer(model, processor, batches, words)
            known[str(spec), blind] = accuracy.score(answers, items)[0].accuracy
        return known[str(spec), blind]

    def measure(specs: Sequence[Any] = ("none",), *, blind: bool = False) -> float:
        return sum(one(spec, blind) for spec in specs) / len(specs)

    return measure


def random(keep: int) -> list[str]:
    return [f"random:keep={keep},positions=original,seed={seed}" for seed in range(3)]


def test_it_answers_and_needs_to_look(share: Callable[..., float]) -> None:
    blind = share(blind=True)
    assert share() >= 0.9 and blind <= 0.25


def test_the_background_tells_little(share: Callable[..., float]) -> None:
    """Five to 28 of the least attended tokens are worth at most a sixth of the way from blind to all tokens."""
    full, blind = share(), share(blind=True)
    for keep in (5, 28):
        assert share([LeastAttended(keep=keep, positions="original")]) <= blind + (full - blind) / 6


def test_attention_beats_chance_at_11_percent(share: Callable[..., float]) -> None:
    assert share(["fastervlm:keep=28,positions=original"]) >= share(random(28)) + 0.05


@pytest.mark.parametrize("keep", [13, 5])
def test_diversity_beats_chance_at_5_and_2_percent(share: Callable[..., float], keep: int) -> None:
    assert share([f"divprune:keep={keep},positions=original"]) >= share(random(keep)) + 0.1


def test_the_folder_is_small_and_safe() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    assert {path.suffix for path in files} <= {".json", ".jinja", ".md", ".safetensors"}
    assert not [path for path in files if path.suffix == ".py"]


def test_the_model_card_is_about_these_questions() -> None:
    card = json.loads((FOLDER / "accuracy.json").read_text())
    assert card["digest"] == digest(list(scenes.questions("test")))
    assert card["digest"] in (FOLDER / "README.md").read_text()
