"""The procedural data set: a pure function, honest splits, balanced answers, questions that agree with the picture."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import vtc
from vtc.eval import content, scenes
from vtc.eval.items import Item, digest, majority

ZOO = Path(vtc.__path__[0]) / "zoo" / "tiny-llava"


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return list(scenes.questions("test"))


def test_same_seed_same_scene() -> None:
    one, two = scenes.Scenes("test")[11], scenes.Scenes("test")[11]
    assert (one.image == two.image).all() and (one.owner == two.owner).all()
    assert one.things == two.things and one.questions == two.questions
    assert (one.image != scenes.Scenes("test")[12].image).any()
    assert (one.image != scenes.Scenes("val")[11].image).any()


def test_digest_is_the_same_in_another_process_and_sees_every_part(items: list[Item]) -> None:
    code = "from vtc.eval import items, scenes; print(items.digest(scenes.questions('test', 40)))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == digest(items[:40])
    assert len({digest(part) for part in (items[:40], items[:39], items[1:41], items[39::-1])}) == 4


def test_splits_share_no_content() -> None:
    splits = [content.DIGIT_SLICES[split] for split in content.SPLITS]
    rows = [set(range(1797)[part]) for part in splits]
    assert sum(map(len, rows)) == len(set.union(*rows)) == len(content._assets()["digits"])
    pictures = [photo.tobytes() for split in content.SPLITS for photo in content.photos(split)]
    assert len(set(pictures)) == len(pictures) >= 8
    textures = {content.texture(split, index, 64).tobytes() for split in content.SPLITS for index in range(20)}
    assert len(textures) == 60


def test_evaluation_set_is_large_interleaved_and_a_prefix_of_itself(items: list[Item]) -> None:
    assert len(items) >= 2000
    assert max(Counter(item.index for item in items).values()) <= scenes.QUESTIONS_PER_SCENE
    assert len({item.index for item in items[:500]}) >= 100
    assert [item.question for item in scenes.questions("test", 123)] == [item.question for item in items[:123]]
    assert all(item.image.size == (128, 128) for item in items[:50])


def test_types_and_answers_are_balanced(items: list[Item]) -> None:
    for part, bound in ((items, 0.25), (items[:500], 0.28)):
        types = Counter(item.type for item in part)
        assert set(types) == set(scenes.QUESTION_TYPES)
        assert min(types.values()) > 0.6 * len(part) / len(types)
        assert majority(part) <= bound
    exist = Counter(item.answer for item in items if item.type == "exist")
    assert abs(exist["yes"] - exist["no"]) <= 0.1 * exist.total()
    counts = Counter(item.answer for item in items if item.type == "count")
    assert set(counts) == set("01234") and max(counts.values()) < 0.3 * counts.total()


def test_majority_of_a_known_set(items: list[Item]) -> None:
    exist = [item for item in items if item.type == "exist"]
    yes, no = ([item for item in exist if item.answer == answer] for answer in ("yes", "no"))
    assert majority(yes[:3] + no[:1]) == 0.75


def answer(question: str, scene: scenes.Scene) -> str:
    """Solve a question from the list of things, independently of how it was made."""
    words = question.rstrip("?").split()
    shapes = [thing for thing in scene.things if thing.kind == "shape"]
    if question.startswith(("What digit", "Which shape is")) and len(words) == 4:
        (found,) = [t for t in scene.things if t.kind == words[1] and t.colour == words[3]]
        return found.name
    if question.startswith("What colour"):
        (found,) = [t for t in scene.things if words[-1] in (t.kind, t.name)]
        return found.colour
    if question.startswith("Where"):
        (found,) = [t for t in shapes if t.name == words[-1]]
        x, y = found.centre
        return f"{'top' if y < 64 else 'bottom'}-{'left' if x < 64 else 'right'}"
    if question.startswith("What word"):
        (found,) = [t for t in scene.things if t.kind == "word"]
        return found.name
    if question.startswith("How many"):
        return str(sum(content.PLURALS[t.name] == words[2] for t in shapes))
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
        scene = scenes.Scenes("train")[seed]
        for question in scene.questions:
            assert answer(question.text, scene) == question.answer, question


def test_owner_map_points_at_the_things() -> None:
    share = []
    for seed in range(100):
        scene = scenes.Scenes("val")[seed]
        assert set(np.unique(scene.owner)) - {0} == set(range(1, len(scene.things) + 1))
        for i, thing in enumerate(scene.things):
            rows, columns = np.nonzero(scene.owner == i + 1)
            left, top, right, bottom = (edge / 8 for edge in thing.box)
            assert rows.min() >= int(top) and rows.max() < bottom
            assert columns.min() >= int(left) and columns.max() < right
        share.append((scene.owner > 0).mean())
    assert 0.1 < np.mean(share) < 0.2  # neither everything nor nothing: that is what makes pruning worth testing


def test_things_do_not_overlap_and_differ_from_the_background() -> None:
    for seed in range(100):
        scene = scenes.Scenes("test")[seed]
        for i, a in enumerate(scene.things):
            left, top, right, bottom = a.box
            assert 0 <= left < right <= 128 and 0 <= top < bottom <= 128
            assert all(scenes._apart(a.box, b.box, gap=3) for b in scene.things[:i])


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="train, val, test"):
        scenes.Scenes("validation")
    with pytest.raises(ValueError, match="circle"):
        content.shape_mask("blob", 16)


def test_the_bundled_tokenizer_knows_every_word(items: list[Item]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ZOO)
    for item in items:
        question = tokenizer(item.question, add_special_tokens=False).input_ids
        reply = tokenizer(item.answer, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in question + reply, item
        assert len(reply) == 1
        assert question == tokenizer(item.question.lower(), add_special_tokens=False).input_ids
