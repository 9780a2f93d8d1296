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
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vtc.eval.content import (
    COLOURS,
    DIGITS,
    SHAPES,
    SPLITS,
    TEXTURES,
    TYPEFACES,
    WORDS,
    cut,
    digits,
    photos,
    shape_mask,
    texture,
    word_mask,
)
from vtc.eval.items import Item, Question, balanced
from vtc.eval.scenes import SIDES, Thing

QUESTION_TYPES = ("digit", "word", "shape", "colour", "where", "exist", "relation")
TILE = 96  # pixels
FORMS = ((2, 2), (2, 2), (1, 3), (3, 1))  # tiles in height and width; square posters are as frequent as long ones
SHAPE_SIZES = range(18, 33)  # pixels
DIGIT_SIZES = range(14, 21)
WORD_SIZES = range(0, 4)  # indices into content.WORD_SIZES: 13 to 16 pixels
GAP = 3  # pixels between things
PHOTO_SHARE = 0.2  # of the backgrounds
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
        if self.split not in SPLITS:
            raise ValueError(f"unknown split {self.split!r}; one of {', '.join(SPLITS)}")

    def __getitem__(self, seed: int) -> Poster:
        rng = random.Random(f"poster-{self.split}-{seed}")
        height, width = self._size(rng)
        image = self._background(rng, height, width)
        things, owner = self._place(rng, image)
        return Poster(np.clip(image, 0, 255).astype(np.uint8), things, owner, tuple(_ask(rng, things, height, width)))

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
        if rng.random() < PHOTO_SHARE:
            source = rng.choice(photos(self.split))
            least = min(source.shape[0] / height, source.shape[1] / width)
            if least < 1:  # enlarge what is smaller than the poster
                size = (int(source.shape[1] / least) + 1, int(source.shape[0] / least) + 1)
                enlarged = Image.fromarray(np.clip(source, 0, 255).astype(np.uint8))
                source = np.asarray(enlarged.resize(size, Image.Resampling.BICUBIC))
        else:
            source = texture(self.split, rng.randrange(TEXTURES[self.split]), TEXTURE_SIDE)
        return cut(rng, source, height, width).astype(np.float32) * rng.uniform(0.8, 1.15) + rng.uniform(-15, 15)

    def _opacity(self, rng: random.Random, kind: str, name: str) -> np.ndarray:
        """The form of one thing, (h, w) float32 in [0, 1]."""
        if kind == "shape":
            return shape_mask(name, rng.choice(SHAPE_SIZES))
        if kind == "word":
            return word_mask(WORDS.index(name), rng.randrange(TYPEFACES), rng.choice(WORD_SIZES))
        size = rng.choice(DIGIT_SIZES)
        digit = Image.fromarray(rng.choice(digits(self.split)[int(name)]))
        return np.clip(np.asarray(digit.resize((size, size), Image.Resampling.BICUBIC)) * 1.25 - 0.1, 0, 1)

    def _place(self, rng: random.Random, image: np.ndarray) -> tuple[tuple[Thing, ...], np.ndarray]:
        """Paint things onto `image` (in place); a thing that finds no free place in 60 tries is left out."""
        plan = [("word", rng.choice(WORDS)) for _ in range(rng.choice([1, 1, 2]))]  # the widest find room first
        plan += [("shape", rng.choice(SHAPES)) for _ in range(rng.choice([2, 3, 3, 4]))]
        plan += [("digit", rng.choice(DIGITS)) for _ in range(rng.choice([1, 1, 2]))]
        height, width, _ = image.shape
        things: list[Thing] = []
        owner = np.zeros((height, width), np.int16)
        for kind, name in plan:
            opacity = self._opacity(rng, kind, name)
            tall, wide = opacity.shape
            for _ in range(60):
                left, top = rng.randint(0, width - wide), rng.randint(0, height - tall)
                box = (left, top, left + wide, top + tall)
                if all(_apart(box, other.box) for other in things):
                    break
            else:
                continue
            colour = rng.choice(list(COLOURS))
            tint = np.clip(np.array(COLOURS[colour]) + [rng.uniform(-16, 16) for _ in range(3)], 0, 255)
            rows, columns = slice(top, top + tall), slice(left, left + wide)
            under = image[rows, columns] * (0.35 if kind == "word" else 1.0)  # words stand on a darkened plate
            image[rows, columns] = under + opacity[..., None] * (tint.astype(np.float32) - under)
            things.append(Thing(kind, name, colour, box))
            owner[rows, columns][(opacity > 0.4) | (kind == "word")] = len(things)
        return tuple(things), owner


def _apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[2] + GAP <= b[0] or b[2] + GAP <= a[0] or a[3] + GAP <= b[1] or b[3] + GAP <= a[1]


def _ask(rng: random.Random, things: tuple[Thing, ...], height: int, width: int) -> Iterator[Question]:
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
            yield _ask_existence(rng, shapes, things, wanted)
    relations = list(_ask_relations(shapes, height, width))
    yield from rng.sample(relations, min(3, len(relations)))


def _noun(thing: Thing) -> str:
    return thing.name if thing.kind == "shape" else thing.kind


def _ask_existence(rng: random.Random, shapes: list[Thing], things: tuple[Thing, ...], wanted: bool) -> Question:
    """Most of the colours asked for in vain are on the poster, but on something else."""
    shape = rng.choice(shapes)
    colour = shape.colour
    if not wanted:
        present = {thing.colour for thing in shapes if thing.name == shape.name}
        absent = [c for c in COLOURS if c not in present]
        elsewhere = [thing.colour for thing in things if thing.colour in absent]
        colour = rng.choice(elsewhere if elsewhere and rng.random() < 0.7 else absent)
    article = "an" if colour[0] in "aeiou" else "a"
    return Question("exist", f"Is there {article} {colour} {shape.name}?", "yes" if wanted else "no")


def _ask_relations(shapes: list[Thing], height: int, width: int) -> Iterator[Question]:
    """Questions for the one kind of shape on one side of another, clearly on that side (8 % of the poster)."""
    names = Counter(shape.name for shape in shapes)
    for shape in shapes:
        if names[shape.name] > 1:
            continue
        for side in SIDES:
            axis, sign = (0 if side in SIDES[:2] else 1), (-1 if side in ("left of", "above") else 1)
            beyond = {
                other: distance
                for other in shapes
                if (distance := sign * (other.centre[axis] - shape.centre[axis])) > 0 and other is not shape
            }
            least = 0.08 * (width if axis == 0 else height)
            if len({other.name for other in beyond}) == 1 and min(beyond.values()) > least:
                yield Question("relation", f"Which shape is {side} the {shape.name}?", next(iter(beyond)).name)


def questions(split: str = "test", limit: int | None = None) -> Iterator[Item]:
    """The evaluation set of a split: at most five questions about each of 500 posters, poster after poster.

    `items.balanced` chooses them; the first `limit` are the first `limit` of the whole set.
    """
    # The seeds of training start at 0 and end far below a billion.
    seeds = range(1_000_000_000, 1_000_000_000 + EVAL_POSTERS)
    posters = ((index, Posters(split)[seed]) for index, seed in enumerate(seeds))
    return balanced(((index, poster, (poster.pil,)) for index, poster in posters), QUESTIONS_PER_SCENE, limit)
