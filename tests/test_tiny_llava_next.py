"""What the bundled AnyRes model has to show for a comparison on it to mean anything; figures are in its model card."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import pytest

import vtc
from training.evaluate_next import Measurement, generated, spec
from vtc.eval import posters
from vtc.eval.items import Item

FOLDER = Path(vtc.__file__).parent / "zoo" / "tiny-llava-next"
QUESTIONS = 150  # of the test split; the standard error of a share is at most 4 points
KEEP = 0.05
RANDOM = tuple(f"random:seed={seed}" for seed in range(3))


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return list(posters.questions("test", QUESTIONS))


@pytest.fixture(scope="module")
def measurement(items: list[Item]) -> Measurement:
    model, processor = vtc.zoo.load("tiny-llava-next")
    groups = (("fastervlm", "divprune", *RANDOM), ("globalcom2",))
    measured = Measurement(model, processor, groups, (KEEP,))
    for _, group in groupby(items, key=lambda item: item.index):
        measured.poster(list(group))
    return measured


@pytest.fixture(scope="module")
def share(measurement: Measurement) -> dict[tuple[str, float], float]:
    """Share of right answers by (strategy, keep), and of `random` the mean over its seeds."""
    shares = {key: score.accuracy for key, score in measurement.scores.items()}
    return shares | {("random", KEEP): sum(shares[name, KEEP] for name in RANDOM) / len(RANDOM)}


def test_it_answers_and_needs_to_look(share: dict[tuple[str, float], float]) -> None:
    assert share["all", 0] >= 0.85 and share["blind", 0] <= 0.28


def test_the_thumbnail_cannot_tell_digits_and_words(measurement: Measurement, items: list[Item]) -> None:
    small = [i for i, item in enumerate(items) if item.type in ("digit", "word")]
    thumbnail, whole = (sum(measurement.scores[name, 0].right[i] for i in small) for name in ("thumbnail", "all"))
    assert whole >= 0.8 * len(small) and thumbnail <= 0.4 * len(small)


@pytest.mark.parametrize("name", ["globalcom2", "fastervlm", "divprune"])
def test_informed_selection_beats_chance(share: dict[tuple[str, float], float], name: str) -> None:
    assert share[name, KEEP] >= share["random", KEEP] + 0.12


def test_the_background_tells_little(share: dict[tuple[str, float], float]) -> None:
    """The least attended tokens are worth at most a third of the way from blind to all tokens."""
    full, blind = share["all", 0], share["blind", 0]
    assert share["anti-[CLS]", KEEP] <= blind + (full - blind) / 3


def test_the_measurement_is_what_generate_gives(measurement: Measurement, items: list[Item]) -> None:
    with vtc.compress(measurement.model, spec("globalcom2:positions=original", KEEP)):
        again = generated(measurement.model, measurement.processor, items[:20])
    agree = sum(a == b for a, b in zip(again, measurement.scores["globalcom2", KEEP].right, strict=False))
    assert agree >= 19  # ties in the last bits may fall the other way


def test_the_folder_is_small_and_safe() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12_000_000
    assert {path.suffix for path in files} <= {".json", ".jinja", ".md", ".safetensors"}


def test_the_model_card_is_about_these_questions() -> None:
    from test_posters import DIGEST

    assert json.loads((FOLDER / "accuracy.json").read_text())["digest"] == DIGEST
    assert DIGEST in (FOLDER / "README.md").read_text()
