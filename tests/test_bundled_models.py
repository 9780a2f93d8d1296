"""What the bundled models have to show for a comparison on them to mean anything, and how their cards come about."""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch

from training import cards, evaluate
from training.cards import BLIND, CARDS, NONE, Result, settings
from training.evaluate import Questions, sight
from training.gauges import Foreground, InLine, LeastAttended, Part
from vtc import zoo
from vtc.compressor import Compressor
from vtc.eval.plan import Setting

# Of the test split; the standard error of a share is at most 3 to 4.5 points.
QUESTIONS = {"tiny-llava": 300, "tiny-llava-next": 120, "tiny-onevision": 120, "tiny-qwen2vl": 160}


@functools.cache
def asked(name: str) -> Questions:
    if name in ("tiny-onevision", "tiny-qwen2vl"):
        pytest.importorskip("torchvision", reason="torchvision, which processors of clips need, is not installed")
    return Questions(name, QUESTIONS[name])


@pytest.fixture(scope="module")
def measure() -> Iterator[Callable[[str, Setting], Result]]:
    """The result of a model under a setting; each is measured once."""
    known: dict[tuple[str, str], Result] = {}

    def one(name: str, setting: Setting) -> Result:
        if (name, setting.spec) not in known:
            known[name, setting.spec] = asked(name).measure(setting)
        return known[name, setting.spec]

    yield one
    asked.cache_clear()


@pytest.fixture(scope="module")
def share(measure: Callable[[str, Setting], Result]) -> Callable[..., float]:
    """Share of right answers with all tokens, blind, or at one budget of a line of the curve."""

    def one(name: str, line: str | Compressor = "none", keep: float = 1.0) -> float:
        usual = {"none": [NONE], "blind": [BLIND]}
        some = usual[line] if isinstance(line, str) and line in usual else settings(line, keep, "original")
        return mean(mean(measure(name, setting).right) for setting in some)

    return one


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("tiny-llava", 0.9, 0.25),
        ("tiny-llava-next", 0.85, 0.28),
        ("tiny-onevision", 0.8, 0.3),
        ("tiny-qwen2vl", 0.8, 0.3),
    ],
)
def test_it_answers_and_needs_to_look(share: Callable[..., float], name: str, least: float, most: float) -> None:
    assert share(name) >= least and share(name, "blind") <= most


@pytest.mark.parametrize(
    ("name", "line", "keep", "margin"),
    [
        ("tiny-llava", "fastervlm", 0.11, 0.05),
        ("tiny-llava", "divprune", 0.05, 0.1),
        ("tiny-llava-next", "globalcom2", 0.05, 0.12),
        ("tiny-llava-next", "divprune", 0.05, 0.12),
        ("tiny-onevision", "fastervlm:saliency=received", 0.05, 0.05),
        ("tiny-qwen2vl", "divprune", 0.11, 0.1),
    ],
)
def test_informed_choice_beats_chance(
    share: Callable[..., float], name: str, line: str, keep: float, margin: float
) -> None:
    assert share(name, line, keep) >= share(name, "random", keep) + margin


@pytest.mark.parametrize(("name", "keep", "part"), [("tiny-llava", 0.11, 6), ("tiny-llava-next", 0.05, 3)])
def test_the_background_tells_little(share: Callable[..., float], name: str, keep: float, part: int) -> None:
    """The least attended tokens are worth at most a part of the way from blind to all tokens."""
    full, blind = share(name), share(name, "blind")
    assert share(name, LeastAttended(), keep) <= blind + (full - blind) / part


def test_the_thumbnail_cannot_tell_digits_and_words(measure: Callable[[str, Setting], Result]) -> None:
    small = [row for row, item in enumerate(asked("tiny-llava-next").items) if item.type in ("digit", "word")]
    thumbnail = Setting("thumbnail", (Part(part="thumbnail"),))
    told, whole = ([measure("tiny-llava-next", one).right[row] for row in small] for one in (thumbnail, NONE))
    assert mean(whole) >= 0.8 and mean(told) <= 0.4


def test_places_are_told_by_coordinates_alone(measure: Callable[[str, Setting], Result]) -> None:
    places = [row for row, item in enumerate(asked("tiny-qwen2vl").items) if item.type == "where"]
    line, whole = ([measure("tiny-qwen2vl", one).right[row] for row in places] for one in (InLine(), NONE))
    assert mean(whole) >= 0.8 and mean(line) <= 0.45


def test_what_survives_is_told(measure: Callable[[str, Setting], Result]) -> None:
    few = {one: settings(one(), 0.02, "original")[0] for one in (Foreground, LeastAttended)}
    foreground, background = (measure("tiny-llava", few[one]) for one in (Foreground, LeastAttended))
    assert foreground.precision == 1.0 and foreground.coverage > 0.5  # five tokens, and at least as many patches
    assert background.precision < 0.1 and background.coverage < 0.1
    assert measure("tiny-llava", NONE).tokens == 256 and measure("tiny-llava", NONE).precision is None
    assert sight(torch.tensor([0, 1, 1, 2, 0, 3]), (0, 1, 2, 3)) == (0.75, pytest.approx(2 / 3))


# ------------------------------------------------------------------------------------------------------------ the cards


@pytest.mark.parametrize("name", CARDS)
def test_every_table_of_a_card_is_measured(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With one line of the curve, and three questions."""
    if name in ("tiny-onevision", "tiny-qwen2vl"):
        pytest.importorskip("torchvision", reason="torchvision, which processors of clips need, is not installed")
    lines = [line for line in CARDS[name].strategies if line in ("uniform", "downsample")]
    short = replace(CARDS[name], keeps=(0.25,), strategies=tuple(lines), by_type=(("uniform", 0.25),))
    monkeypatch.setitem(cards.CARDS, name, replace(short, contiguous=short.contiguous[:1]))
    fields, record = evaluate.evaluate(name, 3, tmp_path)
    text = (Path(evaluate.__file__).with_name("cards") / f"{name}.md").read_text()
    card = string.Template(text).substitute(fields)
    assert fields["curve"] in card and fields["chosen"] in card and "$" not in card
    assert record["questions"] == {"whole": 3, "curve": 3}
    assert len(record["curve"]) == len(lines) + len(short.contiguous[:1])
    (answers,) = tmp_path.iterdir()
    before = answers.read_text()
    assert evaluate.evaluate(name, 3, tmp_path)[1] == record
    assert answers.read_text() == before  # nothing was measured again


@pytest.mark.parametrize("name", CARDS)
def test_the_folder_is_small_and_safe(name: str) -> None:
    files = [path for path in zoo.find(name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12_000_000
    assert {path.suffix for path in files} <= {".json", ".jinja", ".md", ".safetensors"}
