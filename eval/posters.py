"""Procedural questions about pictures too large for one look: what AnyRes models have to cut into crops.

A poster has four times the area of a tile of 96 x 96 pixels, or a little less: square, wide or tall, and often of an
odd size, so that its crops are padded, cut things apart and show unequal shares of it. Four to eight things lie on it:
shapes, handwritten digits and three-letter words. Digits and words are about as small as can still be read; the
thumbnail, which shows the whole poster on one tile, has them at half or a third of that size.

Everything is a pure function of (split, seed). What the splits share and what not is said in `content.py`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from vtc.eval import content
from vtc.eval.content import DIGITS, SHAPES, WORDS
from vtc.eval.items import Item, Question, balanced
from vtc.eval.scenes import Thing, ask_existence, ask_relations, place

QUESTION_TYPES = ("digit", "word", "shape", "colour", "where", "exist", "relation")
TILE = 96  # pixels
FORMS = ((2, 2), (2, 2), (1, 3), (3, 1))  # tiles in height and width; square posters are as frequent as long ones
SIZES: dict[str, Any] = {"shape_sizes": range(18, 33), "digit_sizes": range(14, 21), "word_sizes": 4}  # of `opacity`
TEXTURE_SIDE = 330  # pixels: larger than any poster
EVAL_POSTERS = 500  # posters behind `questions(split)`
QUESTIONS_PER_SCENE = 5


@dataclass(frozen=True)
class Poster:
    """A picture, what is on it, and what can be asked about it."""

    image: np.ndarray  # (H, W, 3) uint8
    things: tuple[Thing, ...]
    owner: np.ndarray  # (H, W) int16, per pixel: 0 is background, i + 1 is things[i]
    questions: tuple[Question, ...]

    @property
    def pil(self) -> Image.Image:
        """The picture as a PIL image."""
        return Image.fromarray(self.image)


@dataclass(frozen=True)
class Posters:
    """The posters of one split: `Posters("test")[7]` is always the same poster.

    `forms` are (rows, columns) of tiles to draw from.
    """

    split: str
    forms: tuple[tuple[int, int], ...] = FORMS

    def __post_init__(self) -> None:
        content.check_split(self.split)

    def __getitem__(self, seed: int) -> Poster:
        rng = random.Random(f"poster-{self.split}-{seed}")
        height, width = self._size(rng)
        image = self._background(rng, height, width)
        things, owner = place(rng, image, self._plan(rng), partial(content.opacity, rng, self.split, **SIZES))
        asked = tuple(_ask(rng, things, height, width))
        return Poster(np.clip(image, 0, 255).astype(np.uint8), tuple(things), owner, asked)

    def _size(self, rng: random.Random) -> tuple[int, int]:
        """Height and width: half of the posters lack up to a third of one side, half are a tenth too large or small."""
        height, width = (float(tiles * TILE) for tiles in rng.choice(self.forms))
        if rng.random() < 0.5:
            share = rng.uniform(0.68, 1)
            height, width = (height * share, width) if rng.random() < 0.5 else (height, width * share)
        if rng.random() < 0.5:
            scale = rng.uniform(0.9, 1.1)
            height, width = height * scale, width * scale
        return round(height), round(width)

    def _background(self, rng: random.Random, height: int, width: int) -> np.ndarray:
        """(height, width, 3) float32."""
        source = content.source(rng, self.split, TEXTURE_SIDE)
        least = min(source.shape[0] / height, source.shape[1] / width)
        if least < 1:  # enlarge a photograph that is smaller than the poster
            size = (int(source.shape[1] / least) + 1, int(source.shape[0] / least) + 1)
            enlarged = Image.fromarray(np.clip(source, 0, 255).astype(np.uint8))
            source = np.asarray(enlarged.resize(size, Image.Resampling.BICUBIC))
        return content.shaded(rng, content.cut(rng, source, height, width))

    def _plan(self, rng: random.Random) -> list[tuple[str, str]]:
        """What goes onto the poster, as (kind, name)."""
        plan = [("word", rng.choice(WORDS)) for _ in range(rng.choice([1, 1, 2]))]  # the widest find room first
        plan += [("shape", rng.choice(SHAPES)) for _ in range(rng.choice([2, 3, 3, 4]))]
        return plan + [("digit", rng.choice(DIGITS)) for _ in range(rng.choice([1, 1, 2]))]


# ----------------------------------------------------------------------------------------------------------- questions


def _ask(rng: random.Random, things: Sequence[Thing], height: int, width: int) -> Iterator[Question]:
    """All questions about a poster that have exactly one right answer."""
    for kind in ("digit", "word", "shape"):
        group = [thing for thing in things if thing.kind == kind]
        tints = Counter(thing.colour for thing in group)
        for thing in group:
            if tints[thing.colour] == 1:
                yield Question(kind, f"{'Which' if kind == 'shape' else 'What'} {kind} is {thing.colour}?", thing.name)

    called = Counter(_noun(thing) for thing in things)
    for thing in things:
        if called[_noun(thing)] > 1:
            continue
        yield Question("colour", f"What colour is the {_noun(thing)}?", thing.colour)
        x, y = thing.centre[0] / width - 0.5, thing.centre[1] / height - 0.5
        if min(abs(x), abs(y)) > 0.07:
            place = f"{'top' if y < 0 else 'bottom'}-{'left' if x < 0 else 'right'}"
            yield Question("where", f"Where is the {_noun(thing)}?", place)

    shapes = [thing for thing in things if thing.kind == "shape"]
    if shapes:
        for wanted in (True, False):
            yield ask_existence(rng, shapes, things, wanted)
    relations = list(ask_relations(shapes, height, width))
    yield from rng.sample(relations, min(3, len(relations)))


def _noun(thing: Thing) -> str:
    return thing.name if thing.kind == "shape" else thing.kind


# ----------------------------------------------------------------------------------------------------- evaluation sets


def questions(split: str = "test", limit: int | None = None) -> Iterator[Item]:
    """The evaluation set of a split: at most five questions about each of 500 posters, poster after poster.

    `items.balanced` chooses them; the first `limit` are the first `limit` of the whole set.
    """
    # The seeds of training start at 0 and end far below a billion.
    seeds = range(1_000_000_000, 1_000_000_000 + EVAL_POSTERS)
    posters = ((index, Posters(split)[seed]) for index, seed in enumerate(seeds))
    return balanced(((index, poster, (poster.pil,)) for index, poster in posters), QUESTIONS_PER_SCENE, limit)
