"""The bundled evaluation sets: what they share, and their export."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vtc.errors import VtcError
from vtc.eval import accuracy, content, tasks
from vtc.eval.items import Item, digest
from vtc.eval.lmms import clips, export


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
