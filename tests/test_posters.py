"""The posters: a pure function, honest splits, balanced answers, questions that agree with the picture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import vtc
from vtc.eval import posters
from vtc.eval.items import Item, digest, majority

DIGEST = "01a724665ce8ddcd0a4201d7f9dcc004a2d599522f546954b8d5e4bfb5df2566"
TOKENIZER = Path(vtc.__path__[0]) / "zoo" / "tiny-llava"


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return list(posters.questions("test"))


def test_same_seed_same_poster() -> None:
    one, two = posters.Posters("test")[11], posters.Posters("test")[11]
    assert (one.image == two.image).all() and (one.owner == two.owner).all()
    assert one.things == two.things and one.questions == two.questions
    for other in (posters.Posters("test")[12], posters.Posters("val")[11]):
        assert one.image.shape != other.image.shape or (one.image != other.image).any()


def test_the_evaluation_set_is_the_one_the_model_card_is_about(items: list[Item]) -> None:
    assert len(items) >= 2000
    assert digest(items) == DIGEST
    assert [item.question for item in posters.questions("test", 123)] == [item.question for item in items[:123]]


def test_types_and_answers_are_balanced(items: list[Item]) -> None:
    types = Counter(item.type for item in items)
    assert set(types) == set(posters.QUESTION_TYPES)
    assert max(types.values()) - min(types.values()) <= 5
    assert majority(items) <= 0.2
    exist = Counter(item.answer for item in items if item.type == "exist")
    assert abs(exist["yes"] - exist["no"]) <= 2


def test_sizes_are_odd_and_of_every_form(items: list[Item]) -> None:
    sizes = {item.image.size for item in items}
    assert len(sizes) > 200
    shares = Counter("wide" if w > 1.6 * h else "tall" if h > 1.6 * w else "square" for w, h in sizes)
    assert all(shares[form] >= 0.15 * len(sizes) for form in ("wide", "tall", "square"))
    assert max(max(size) for size in sizes) <= posters.TEXTURE_SIDE


def answer(question: str, poster: posters.Poster) -> str:
    """Solve a question from the list of things, independently of how it was made."""
    words = question.rstrip("?").split()
    shapes = [thing for thing in poster.things if thing.kind == "shape"]
    if question.startswith(("What digit", "What word", "Which shape is")) and len(words) == 4:
        (found,) = [t for t in poster.things if t.kind == words[1] and t.colour == words[3]]
        return found.name
    if question.startswith(("What colour", "Where")):
        (found,) = [t for t in poster.things if words[-1] == (t.name if t.kind == "shape" else t.kind)]
        if question.startswith("What"):
            return found.colour
        height, width, _ = poster.image.shape
        x, y = found.centre
        return f"{'top' if 2 * y < height else 'bottom'}-{'left' if 2 * x < width else 'right'}"
    if question.startswith("Is there"):
        return "yes" if any([t.colour, t.name] == words[3:] for t in shapes) else "no"
    (reference,) = [t for t in shapes if t.name == words[-1]]
    axis, sign = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[words[3]]
    (name,) = {t.name for t in shapes if sign * (t.centre[axis] - reference.centre[axis]) > 0}
    return name


def test_every_answer_follows_from_the_things(items: list[Item]) -> None:
    for item in items:
        assert answer(item.question, item.scene) == item.answer, item
    for seed in range(200):
        poster = posters.Posters("train")[seed]
        for question in poster.questions:
            assert answer(question.text, poster) == question.answer, question


def test_things_do_not_overlap_and_are_where_the_owner_map_says() -> None:
    share = []
    for seed in range(100):
        poster = posters.Posters("val")[seed]
        height, width, _ = poster.image.shape
        assert poster.owner.shape == (height, width)
        for i, a in enumerate(poster.things):
            left, top, right, bottom = a.box
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert all(posters._apart(a.box, b.box) for b in poster.things[:i])
            rows, columns = np.nonzero(poster.owner == i + 1)
            assert top <= rows.min() <= rows.max() < bottom and left <= columns.min() <= columns.max() < right
        share.append((poster.owner > 0).mean())
    assert 0.03 < np.mean(share) < 0.12


def test_unknown_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="train, val, test"):
        posters.Posters("validation")


def test_the_tokenizer_knows_every_word(items: list[Item]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    for item in items:
        question, reply = (tokenizer(text, add_special_tokens=False).input_ids for text in (item.question, item.answer))
        assert tokenizer.unk_token_id not in question + reply, item
        assert len(reply) == 1
