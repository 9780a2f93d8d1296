"""Pictures of many sizes and clips: a pure function, honest splits, balanced answers, right answers."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from vtc.eval import sizes
from vtc.eval.content import PLURALS
from vtc.eval.items import Item, digest, majority


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return list(sizes.questions("test"))


def test_same_seed_same_scene() -> None:
    for seed in range(8):  # pictures and clips
        one, two = sizes.Scenes("test")[seed], sizes.Scenes("test")[seed]
        assert (one.frames == two.frames).all() and (one.owner == two.owner).all()
        assert one.things == two.things and one.questions == two.questions
    other = sizes.Scenes("val", one.frames.shape[:3])[seed]
    assert (other.frames != one.frames).any()


def test_digest_is_the_same_in_another_process(items: list[Item]) -> None:
    code = "from vtc.eval import items, sizes; print(items.digest(sizes.questions('test', 40)))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == digest(items[:40])


def test_the_evaluation_set_is_large_and_a_prefix_of_itself(items: list[Item]) -> None:
    assert len(items) >= 2000
    assert max(Counter(item.index for item in items).values()) <= sizes.QUESTIONS_PER_SCENE
    assert [item.question for item in sizes.questions("test", 123)] == [item.question for item in items[:123]]


def test_media_have_many_sizes(items: list[Item]) -> None:
    pictures = [item.image.size for item in items if item.images]
    assert {side % sizes.CELL for size in pictures for side in size} == {0}
    assert {min(side) for side in zip(*pictures, strict=True)} == {64} and max(map(max, pictures)) == 192
    assert max(map(max, pictures)) / min(map(min, pictures)) == 3 and len(set(pictures)) > 50
    clips = {clip.shape[:3] for item in items for clip in item.clips}
    assert clips == set(sizes.CLIPS)
    assert 0.2 < sum(bool(item.clips) for item in items) / len(items) < 0.5


def test_types_and_answers_are_balanced(items: list[Item]) -> None:
    types = Counter(item.type for item in items)
    assert set(types) == set(sizes.QUESTION_TYPES)
    assert min(types.values()) > 0.6 * len(items) / len(types)
    assert majority(items) <= 0.25
    for kind, share in (("exist", 0.55), ("count", 0.3), ("where", 0.3), ("motion", 0.3), ("order", 0.2)):
        answers = Counter(item.answer for item in items if item.type == kind)
        assert max(answers.values()) <= share * answers.total()


def answer(question: str, scene: sizes.Scene) -> str:
    """Solve a question from the list of things, independently of how it was made."""
    words = question.rstrip("?").split()
    shapes = [thing for thing in scene.things if thing.kind == "shape"]
    _, height, width, _ = scene.frames.shape
    if question.startswith("Which shape appears"):
        found = sorted(shapes, key=lambda thing: thing.seen[0])
        assert found[0].seen[0] < found[1].seen[0] and found[-2].seen[0] < found[-1].seen[0]
        return found[0 if words[-1] == "first" else -1].name
    if question.startswith("Which way"):
        (mover,) = [t for t in shapes if t.name == words[-2]]
        return mover.way
    if question.startswith(("What digit", "Which shape is")) and len(words) == 4:
        (one,) = [t for t in scene.things if t.kind == words[1] and t.colour == words[3]]
        return one.name
    if question.startswith("What colour"):
        (one,) = [t for t in scene.things if words[-1] in (t.kind, t.name)]
        return one.colour
    if question.startswith("Where"):
        (one,) = [t for t in shapes if t.name == words[-1]]
        x, y = one.centre
        return f"{'top' if y < height / 2 else 'bottom'}-{'left' if x < width / 2 else 'right'}"
    if question.startswith("What word"):
        (one,) = [t for t in scene.things if t.kind == "word"]
        return one.name
    if question.startswith("How many"):
        return str(sum(PLURALS[t.name] == words[2] for t in shapes))
    if question.startswith("Is there"):
        return "yes" if any([t.colour, t.name] == words[3:] for t in shapes) else "no"
    (reference,) = [t for t in shapes if t.name == words[-1]]
    axis, sign = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[words[3]]
    (name,) = {t.name for t in shapes if sign * (t.centre[axis] - reference.centre[axis]) > 0}
    return name


def test_every_answer_follows_from_the_things(items: list[Item]) -> None:
    for item in items:
        assert answer(item.question, item.scene) == item.answer, item
    for seed in range(150):
        scene = sizes.Scenes("train")[seed]
        for question in scene.questions:
            assert answer(question.text, scene) == question.answer, question


def test_things_stay_inside_and_apart() -> None:
    for seed in range(100):
        scene = sizes.Scenes("test")[seed]
        length, height, width, _ = scene.frames.shape
        for i, thing in enumerate(scene.things):
            left, top, right, bottom = thing.swept
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert 0 <= thing.seen[0] < thing.seen[1] <= length
            for other in scene.things[:i]:
                together = thing.seen[0] < other.seen[1] and other.seen[0] < thing.seen[1]
                assert not together or sizes._apart(thing.swept, other.swept)


def test_frames_and_owners_show_the_things() -> None:
    share = []
    for seed in range(60):
        scene = sizes.Scenes("val")[seed]
        length, height, width, _ = scene.frames.shape
        assert scene.owner.shape == (max(1, length // 2), height // 8, width // 8)
        assert set(np.unique(scene.owner)) - {0} == set(range(1, len(scene.things) + 1))
        for i, thing in enumerate(scene.things):
            pairs, rows, columns = np.nonzero(scene.owner == i + 1)
            assert pairs.min() == thing.seen[0] // 2 and pairs.max() == (thing.seen[1] - 1) // 2
            left, top, right, bottom = (edge / 8 for edge in thing.swept)
            assert rows.min() >= int(top) and rows.max() < bottom
            assert columns.min() >= int(left) and columns.max() < right
        # Where nothing moves, a clip stands still.
        still = np.ones((height, width), bool)
        for thing in scene.things:
            left, top, right, bottom = thing.swept
            still[top:bottom, left:right] = False
        assert (scene.frames[:, still] == scene.frames[:1, still]).all()
        share.append((scene.owner > 0).mean())
    assert 0.08 < np.mean(share) < 0.2  # neither everything nor nothing: that is what makes pruning worth testing


def test_unknown_splits_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="train, val, test"):
        sizes.Scenes("validation")
    with pytest.raises(ValueError, match="multiples of 16"):
        sizes.Scenes("val", (1, 100, 64))
