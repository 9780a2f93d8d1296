"""Questions with one right answer about pictures and clips: what every bundled evaluation set is made of."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image

Clip = np.ndarray  # (frames, height, width, 3) uint8
Medium = Image.Image | Clip


def shape(medium: Medium) -> tuple[int, ...]:
    """(height, width) of a picture, (frames, height, width) of a clip."""
    return medium.size[::-1] if isinstance(medium, Image.Image) else tuple(np.shape(medium)[:3])


@dataclass(frozen=True)
class Question:
    """One question with its only right answer, which is one word."""

    type: str
    text: str
    answer: str


@dataclass(frozen=True, eq=False)
class Item:
    """One line of an evaluation set. A prompt shows the media in their order, then asks."""

    question: str
    answer: str
    type: str
    index: int  # of the scene: items with the same index share their media
    media: tuple[Medium, ...]
    scene: Any = field(repr=False)  # what the generator knows about the media

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The pictures among the media."""
        return tuple(medium for medium in self.media if isinstance(medium, Image.Image))

    @property
    def clips(self) -> tuple[Clip, ...]:
        """The clips among the media, (frames, height, width, 3) uint8 each."""
        return tuple(medium for medium in self.media if not isinstance(medium, Image.Image))

    @property
    def image(self) -> Image.Image:
        """The picture of a question about a single one."""
        (image,) = self.media
        if not isinstance(image, Image.Image):
            raise TypeError("this question is about a clip: it has no picture")
        return image


class Askable(Protocol):
    """Anything one can ask about."""

    @property
    def questions(self) -> Sequence[Question]:
        """All questions that have exactly one right answer."""
        ...


def balanced(
    scenes: Iterable[tuple[int, Askable, tuple[Medium, ...]]], most: int, limit: int | None = None
) -> Iterator[Item]:
    """At most `most` questions about each scene, given as (index, scene, media); `limit` of them in all.

    Of each scene at most one question per type is taken, first those of which the set so far has the fewest, by type,
    then by answer; so the types, and the answers of a type, come out about equally often.
    """
    types: Counter[str] = Counter()
    answers: Counter[tuple[str, str]] = Counter()
    made = 0
    for index, scene, media in scenes:
        ranked = sorted(scene.questions, key=lambda q: (types[q.type], answers[q.type, q.answer]))
        best = {question.type: question for question in reversed(ranked)}
        for question in sorted(best.values(), key=lambda q: types[q.type])[:most]:
            if made == limit:
                return
            types[question.type] += 1
            answers[question.type, question.answer] += 1
            made += 1
            yield Item(question.text, question.answer, question.type, index, media, scene)


def digest(items: Iterable[Item]) -> str:
    """SHA-256 over the media, questions and answers, in order: two equal digests mean the same evaluation."""
    total = hashlib.sha256()
    for item in items:
        for medium in item.media:
            total.update(np.asarray(medium).tobytes())
        total.update(f"{item.index}\t{item.type}\t{item.question}\t{item.answer}\n".encode())
    return total.hexdigest()


def majority(items: Iterable[Item]) -> float:
    """Accuracy of the best answer that looks at the question's type only: what can be had without the media."""
    answers: dict[str, Counter[str]] = {}
    for item in items:
        answers.setdefault(item.type, Counter())[item.answer] += 1
    total = sum(sum(counts.values()) for counts in answers.values())
    return sum(max(counts.values()) for counts in answers.values()) / max(1, total)
