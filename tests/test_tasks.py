"""The bundled evaluation sets: what they share, and their export."""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.version import Version
from PIL import Image
from transformers import AutoTokenizer

from vtc import zoo
from vtc.errors import VtcError
from vtc.eval import accuracy, content, tasks
from vtc.eval.items import Item, digest, majority, shape
from vtc.eval.lmms import clips, export

# Questions of the rarest type, as a share of what it would be if all were equally many.
RAREST = {"scenes": 0.7, "posters": 0.95, "clips": 0.35, "sizes": 0.6}


@functools.cache
def whole(task: str) -> list[Item]:
    return list(tasks.questions(task, "test"))


@pytest.mark.parametrize("task", tasks.names())
def test_the_set_is_the_one_the_model_card_is_about(task: str) -> None:
    folder = zoo.find(tasks.TRAINED[task])
    told = json.loads((folder / "accuracy.json").read_text())["digest"]
    assert told in (folder / "README.md").read_text()
    if Version(np.__version__) < Version("2.3") and task != "posters":
        pytest.skip("older numpy rounds the mean brightness of a photograph otherwise, and a few pixels with it")
    assert told == digest(whole(task))


@pytest.mark.parametrize("task", tasks.names())
def test_the_set_is_large_a_prefix_of_itself_and_the_same_in_another_process(task: str) -> None:
    items = whole(task)
    module = importlib.import_module(f"vtc.eval.{task}")
    assert len(items) >= 2000
    assert max(Counter(item.index for item in items).values()) <= module.QUESTIONS_PER_SCENE
    first = digest(items[:123])
    assert digest(tasks.questions(task, "test", 123)) == first
    code = f"from vtc.eval import items, tasks; print(items.digest(tasks.questions('{task}', 'test', 123)))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == first


@pytest.mark.parametrize("task", tasks.names())
def test_types_and_answers_are_balanced(task: str) -> None:
    items = whole(task)
    for part, bound in ((items, 0.25), (items[:500], 0.28)):
        types = Counter(item.type for item in part)
        assert set(types) == set(importlib.import_module(f"vtc.eval.{task}").QUESTION_TYPES)
        assert majority(part) <= bound
    types = Counter(item.type for item in items)
    assert min(types.values()) >= RAREST[task] * len(items) / len(types)
    for kind in types:
        answers = Counter(item.answer for item in items if item.type == kind)
        if len(answers) <= 5:  # of more, each occurs too seldom to tell
            assert max(answers.values()) <= (1.1 if kind == "exist" else 1.5) * answers.total() / len(answers), kind
    assert {item.answer for item in items if item.type == "count"} in (set(), set("01234"))


def answer(question: str, things: Sequence[Any], height: int, width: int) -> str:
    """Solve a question from the list of things, independently of how it was made."""
    words = question.rstrip("?").split()
    shapes = [thing for thing in things if thing.kind == "shape"]
    if question.startswith("Which shape appears"):
        found = sorted(shapes, key=lambda thing: thing.seen[0])
        assert found[0].seen[0] < found[1].seen[0] and found[-2].seen[0] < found[-1].seen[0]
        return found[0 if words[-1] == "first" else -1].name
    if question.startswith("How many"):
        return str(sum(content.PLURALS[thing.name] == words[2] for thing in shapes))
    if question.startswith("Is there"):
        return "yes" if any([thing.colour, thing.name] == words[3:] for thing in shapes) else "no"
    if len(words) == 4 and words[2] == "is":  # What digit is red? Which shape is red? What word is written?
        (one,) = [thing for thing in things if thing.kind == words[1] and words[3] in (thing.colour, "written")]
        return one.name
    noun = words[-2] if words[-1] == "move" else words[-1]
    (one,) = [thing for thing in things if noun == (thing.name if thing.kind == "shape" else thing.kind)]
    if question.startswith("Which way"):
        return one.way
    if question.startswith("What colour"):
        return one.colour
    x, y = one.centre
    if question.startswith("Where"):
        return f"{'top' if y < height / 2 else 'bottom'}-{'left' if x < width / 2 else 'right'}"
    axis, sign = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[words[3]]
    (name,) = {other.name for other in shapes if sign * (other.centre[axis] - one.centre[axis]) > 0}
    return name


@pytest.mark.parametrize("task", ["scenes", "posters", "sizes"])
def test_every_answer_follows_from_the_things(task: str) -> None:
    """Of all questions about the scenes of the set, not only those that were chosen."""
    scenes = {item.index: item for item in whole(task)}
    for item in scenes.values():
        height, width = shape(item.media[0])[-2:]
        for question in item.scene.questions:
            assert answer(question.text, item.scene.things, height, width) == question.answer, question
    chosen = {(item.index, item.question, item.answer) for item in whole(task)}
    assert chosen <= {(i, q.text, q.answer) for i, item in scenes.items() for q in item.scene.questions}


@pytest.mark.parametrize("task", tasks.names())
def test_the_tokenizer_of_its_model_knows_every_word(task: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(zoo.find(tasks.TRAINED[task]))
    for item in whole(task):
        question, lower, reply = (
            tokenizer(text, add_special_tokens=False).input_ids
            for text in (item.question, item.question.lower(), item.answer)
        )
        assert tokenizer.unk_token_id not in question + reply and len(reply) == 1, item
        assert question == lower


def test_a_digest_sees_every_part() -> None:
    items = whole("clips")[:40]
    parts = [items, items[:39], items[1:], items[::-1]]
    (item, *_) = (item for item in items if item.clips)
    changed = item.clips[0].copy()
    changed[-1, -1, -1, -1] ^= 1
    parts += [[item], [Item(item.question, item.answer, item.type, item.index, (changed,), item.scene)]]
    assert len({digest(part) for part in parts}) == len(parts)


def test_majority_of_a_known_set() -> None:
    exist = [item for item in whole("scenes") if item.type == "exist"]
    yes, no = ([item for item in exist if item.answer == answer] for answer in ("yes", "no"))
    assert majority(yes[:3] + no[:1]) == 0.75


@pytest.mark.parametrize("task", tasks.names())
def test_unknown_splits_are_refused(task: str) -> None:
    with pytest.raises(ValueError, match="train, val, test"):
        next(tasks.questions(task, "validation"))


def test_splits_share_no_content() -> None:
    splits = [content.DIGIT_SLICES[split] for split in content.SPLITS]
    rows = [set(range(1797)[part]) for part in splits]
    assert sum(map(len, rows)) == len(set.union(*rows)) == len(content._assets()["digits"])
    pictures = [photo.tobytes() for split in content.SPLITS for photo in content.photos(split)]
    assert len(set(pictures)) == len(pictures) >= 8
    textures = {content.texture(split, index, 64).tobytes() for split in content.SPLITS for index in range(20)}
    assert len(textures) == 60


def test_unknown_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="circle"):
        content.shape_mask("blob", 16)


@pytest.mark.parametrize("task", tasks.names())
def test_every_task_asks_about_pictures_or_clips(task: str) -> None:
    items = list(tasks.questions(task, "val", 40))
    assert len(items) == 40
    assert [item.question for item in tasks.questions(task, "val", 7)] == [item.question for item in items[:7]]
    assert max(Counter((item.index, item.type) for item in items).values()) == 1  # so scene and type name a question
    for item in items:
        assert item.media and item.question.endswith("?") and len(item.answer.split()) == 1
        assert len(item.images) + len(item.clips) == len(item.media)
        assert all(clip.ndim == 4 and clip.shape[-1] == 3 and clip.dtype == np.uint8 for clip in item.clips)
        assert all(image.mode == "RGB" for image in item.images)


@pytest.mark.parametrize("task", tasks.names())
def test_questions_of_one_scene_share_their_media(task: str) -> None:
    """Batches encode by the number of the scene what several questions show."""
    known: dict[int, tuple] = {}
    for item in tasks.questions(task, "test", 300):
        first = known.setdefault(item.index, item.media)
        assert len(first) == len(item.media)
        assert all(np.array_equal(one, other) for one, other in zip(first, item.media, strict=True))


@pytest.mark.parametrize("task", tasks.names())
def test_splits_ask_about_other_media(task: str) -> None:
    first = [next(iter(tasks.questions(task, split, 1))) for split in content.SPLITS]
    assert len({digest([item]) for item in first}) == len(content.SPLITS)


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(VtcError, match=r"unknown task 'scene' \(did you mean 'scenes'\?\)"):
        tasks.questions("scene")


def test_bundled_models_have_their_task_and_others_the_usual_one() -> None:
    assert {tasks.task_of(model) for model in tasks.TRAINED.values()} == set(tasks.names())
    assert tasks.task_of("/somewhere/llava-1.5-7b-hf") == "scenes"


@pytest.mark.parametrize("task", tasks.names())
def test_the_exported_task_shows_the_same_pixels(task: str, tmp_path: Path) -> None:
    items = list(tasks.questions(task, "test", 12))
    if any(item.clips for item in items):
        pytest.importorskip("av", reason="PyAV, which writes clips, is not installed")
    export.export(tmp_path, len(items), [task])
    lines = (tmp_path / f"{task}-test.jsonl").read_text().splitlines()
    for line, item in zip(lines, items, strict=True):
        document = json.loads(line)
        shown = export.doc_to_visual(document)
        for one, medium in zip(shown, item.media, strict=True):
            if isinstance(medium, Image.Image):
                assert (np.asarray(one) == np.asarray(medium)).all()
            else:
                read = clips.read(one, count=1000)
                assert read.frames.shape == medium.shape and (read.frames == medium).all()
        assert export.doc_to_text(document) == item.question
        assert export.process_results(document, [f" {item.answer.upper()}."]) == {"exact_match": 1.0}
        assert export.process_results(document, ["something"]) == {"exact_match": 0.0}
    assert f"vtc_{task}" in (tmp_path / f"vtc_{task}.yaml").read_text()


class Processor:
    """Counts words, and notes what it is given."""

    chat_template = None
    image_token, video_token = "<image>", "<video>"

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def tokenizer(self, text: str) -> dict:
        return {"input_ids": text.split()}

    def __call__(self, **given: object) -> dict:
        self.calls.append(given)
        return {}


def picture(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height))


def test_batches_hold_prompts_of_one_length_whatever_they_show() -> None:
    still, clip = picture(32, 16), np.zeros((4, 16, 16, 3), np.uint8)
    media = [(still,), (clip,), (picture(16, 32),), (still, clip), (still,), (clip[:2],), (clip,)]
    items = [Item("Where is it?", "top", "where", k, some, None) for k, some in enumerate(media)]
    processor = Processor()
    found = accuracy.batches(processor, items, 10)
    assert sorted(batch.rows for batch in found) == [(0, 4), (1, 6), (2,), (3,), (5,)]
    for batch, call in zip(found, processor.calls, strict=True):
        for row, text in zip(batch.rows, call["text"], strict=True):
            kinds = {"image": len(items[row].images), "video": len(items[row].clips)}
            assert {kind: text.count(f"<{kind}>") for kind in kinds} == kinds
        images = [list(items[row].images) for row in batch.rows]
        assert call.get("images", [[] for _ in batch.rows]) == images
        assert len(call.get("videos", [])) == sum(len(items[row].clips) for row in batch.rows)
    blind = accuracy.batches(Processor(), items, 10, blind=True)
    assert [batch.rows for batch in blind] == [tuple(range(7))]
