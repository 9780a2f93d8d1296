"""The bundled evaluation sets by name, and the bundled models that were trained for them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from vtc.errors import VtcError, did_you_mean
from vtc.eval.items import Item

TRAINED = {  # each task is a module of this package; its model has learned from the task's training split
    "scenes": "tiny-llava",
    "posters": "tiny-llava-next",
    "clips": "tiny-onevision",
    "sizes": "tiny-qwen2vl",
}
DEFAULT = "scenes"


def names() -> tuple[str, ...]:
    """The bundled tasks."""
    return tuple(TRAINED)


def check(task: str) -> str:
    """`task`, if there is such a task."""
    if task not in TRAINED:
        raise VtcError(f"unknown task '{task}'{did_you_mean(task, TRAINED)}; bundled: {', '.join(TRAINED)}")
    return task


def task_of(model: str) -> str:
    """The task that a bundled model was trained for; of any other model the default one."""
    return next((task for task, trained in TRAINED.items() if trained == model), DEFAULT)


def questions(task: str, split: str = "test", limit: int | None = None) -> Iterator[Item]:
    """The first `limit` questions of a task, or all of them."""
    return import_module(f"vtc.eval.{check(task)}").questions(split, limit)
