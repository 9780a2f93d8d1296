"""What happens in clips, and answers that follow from it; what all bundled sets share is tested in `test_tasks.py`."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from vtc.eval import clips, items
from vtc.eval.clips import Actor, Clip, Clips, Pair, Pairs, Pictures
from vtc.eval.content import apart


@pytest.fixture(scope="module")
def asked() -> list[items.Item]:
    return list(clips.questions("test"))


def test_the_set_is_mixed(asked: list[items.Item]) -> None:
    for part in (asked, asked[:300]):
        assert {item.type for item in part} == set(clips.QUESTION_TYPES)
        assert {len(item.clips) for item in part} == {0, 1} and {len(item.images) for item in part} == {0, 1, 2}
    moving = [item for item in asked if item.clips]
    assert len(moving) > 0.6 * len(asked)
    assert {len(item.clips[0]) for item in moving} == set(clips.EVAL_FRAMES)
    assert {item.image.size for item in asked if len(item.images) == 1} == {
        (64 * across, 64 * down) for down, across in clips.PICTURES
    }


def test_frames_show_what_happens() -> None:
    """In every frame the colour of each thing is where the thing is, and nothing changes between events."""
    for seed in range(40):
        clip = Clips("val")[seed]
        frames = clip.frames.astype(int)
        assert frames.shape == (clip.length, 64, 64, 3) and clip.length in range(16, 33)
        for frame in range(clip.length):
            for actor in clip.actors:
                if actor.shown(frame):
                    left, top = actor.place_at(frame)
                    inside = actor.opacity > 0.99
                    rows, columns = (slice(at, at + n) for at, n in zip((top, left), inside.shape, strict=True))
                    tint = np.array(clips.COLOURS[actor.colour_at(frame)])
                    assert np.abs(frames[frame, rows, columns][inside] - tint).max() <= 8
        still = [a == b for a, b in pairwise(clip.states)]
        assert still == [bool((a == b).all()) for a, b in pairwise(frames)]


def test_most_frames_say_nothing_new() -> None:
    """That is what makes merging over time worth testing; and no clip is a single picture."""
    share = [len(set(clip.states)) / clip.length for clip in (Clips("val")[seed] for seed in range(100))]
    assert 0.2 < np.mean(share) < 0.5


def test_things_never_touch() -> None:
    for seed in range(40):
        clip = Clips("val")[seed]
        for frame in range(clip.length):
            boxes = []
            for actor in clip.actors:
                if actor.shown(frame):
                    (left, top), (height, width) = actor.place_at(frame), actor.opacity.shape
                    boxes.append((left, top, left + width, top + height))
            for i, box in enumerate(boxes):
                assert min(box) >= 0 and max(box) <= 64
                assert all(apart(box, other, gap=1) for other in boxes[:i])


def answer(question: str, actors: list[Actor], cuts: tuple[int, ...]) -> set[str]:
    """All right answers to a question about a clip, from the list of things, independently of how it was made."""
    words = question.rstrip("?").split()
    digits, shapes = ([actor for actor in actors if actor.kind == kind] for kind in ("digit", "shape"))
    group = digits if words[1] == "digit" else shapes
    named = [actor for actor in actors if actor.name == words[-1] or actor.name == words[-2]]
    if question.startswith("How many"):
        return {str(len(cuts) - 1)}
    if words[-1] == "scene":
        (low, high) = cuts[:2] if words[-2] == "first" else cuts[-2:]
        return {actor.name for actor in group if low <= actor.start < high}
    if words[:3] == ["What", "digit", "came"]:
        if words[3] == "after":
            (shape,) = (actor for actor in shapes if actor.name == words[5])
            digits = [digit for digit in digits if digit.start >= shape.end]
        times = [digit.start for digit in digits]
        time = max(times) if words[3] == "last" else min(times)
        return {digit.name for digit in digits if digit.start == time}
    if words[-1] == "turn":
        return {str(actor.later) for actor in named}
    if words[-1] == "move":
        return {str(actor.way) for actor in named}
    if words[0] == "Is":
        return {"yes" if any(a.name == words[4] and words[3] in a.colours for a in shapes) else "no"}
    if words[1] == "colour":
        return {actor.colour for actor in named}
    return {actor.name for actor in group if words[-1] in actor.colours}


def test_every_answer_about_a_clip_follows_from_what_happens() -> None:
    kinds = set()
    for seed in range(150):
        clip = Clips("train")[seed]
        for question in clip.questions:
            assert answer(question.text, list(clip.actors), clip.cuts) == {question.answer}, question
            kinds.add(question.type)
    assert kinds == {*clips.MOVING_TYPES, "digit", "colour", "shape", "exist"}


def test_every_answer_about_pictures_follows_from_what_they_show(asked: list[items.Item]) -> None:
    for item in asked:
        words = item.question.rstrip("?").split()
        if isinstance(item.scene, Pair):
            first, second = ({actor.name for actor in picture.actors} for picture in item.scene.pictures)
            if item.type == "which":
                assert (words[-1] in first, words[-1] in second) == (item.answer == "first", item.answer == "second")
            else:
                shown = item.scene.pictures[words[-2] == "second"].actors
                assert {actor.name for actor in shown if actor.kind == words[1]} == {item.answer}
        elif len(item.images) == 1 and item.type == "where":
            (actor,) = (actor for actor in item.scene.actors if actor.name == words[-1])
            (left, top), (tall, wide), (width, height) = actor.place, actor.opacity.shape, item.image.size
            down, across = top + tall / 2 > height / 2, left + wide / 2 > width / 2
            assert item.answer == f"{'bottom' if down else 'top'}-{'right' if across else 'left'}"
        elif len(item.images) == 1 and item.type == "word":
            assert [actor.name for actor in item.scene.actors if actor.kind == "word"] == [item.answer]
        elif len(item.images) == 1:
            assert answer(item.question, list(item.scene.actors), item.scene.cuts) == {item.answer}


def test_owners_point_at_the_things() -> None:
    for seed in range(20):
        clip: Clip = Pictures("val").make(seed, (2, 2))
        owners = clip.owners(8)[0]
        assert owners.shape == (16, 16) and set(np.unique(owners)) == set(range(len(clip.actors) + 1))
        for i, actor in enumerate(clip.actors):
            rows, columns = np.nonzero(owners == i + 1)
            (left, top), (height, width) = actor.place, actor.opacity.shape
            assert top // 8 <= rows.min() and rows.max() <= (top + height) // 8
            assert left // 8 <= columns.min() and columns.max() <= (left + width) // 8


def test_a_length_and_a_split_can_be_asked_for() -> None:
    assert Clips("val").make(5, 20).length == 20 and Clips("val", (6, 8))[0].length in (6, 7, 8)
    assert Pairs("val")[0].questions
