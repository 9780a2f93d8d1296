"""Procedural question answering about pictures: a small task with exact answers, made in memory.

A scene is a 128 x 128 canvas with three to six things on a textured or photographic background: shapes, handwritten
digits and three-letter words, each in one of eight colours. Things cover about 15 % of the patches of 8 x 8 pixels, so
questions can be answered from few visual tokens, but only from the right ones. Everything is a pure function of
(split, seed).

The splits share the vocabulary and nothing else: their seeds are disjoint, and so is their content (`content.py`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from vtc.eval import content
from vtc.eval.content import COLOURS, DIGITS, PLURALS, SHAPES, WORDS, Box, apart
from vtc.eval.items import Item, Question, balanced

SIDES = ("left of", "right of", "above", "below")
QUESTION_TYPES = ("digit", "colour", "shape", "where", "word", "count", "exist", "relation")
MAX_COUNT = 4
GAP = 3  # pixels between things
EVAL_SCENES = 500  # scenes behind `questions(split)`
QUESTIONS_PER_SCENE = 5


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    kind: str  # "shape", "digit" or "word"
    name: str  # "square", "7", "cat"
    colour: str
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the middle of the box, in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """A picture, what is in it, and what can be asked about it."""

    image: np.ndarray  # (canvas, canvas, 3) uint8
    things: tuple[Thing, ...]
    owner: np.ndarray  # (canvas / patch, canvas / patch) int64: 0 is background, i + 1 is things[i]
    questions: tuple[Question, ...]

    @property
    def pil(self) -> Image.Image:
        """The picture as a PIL image."""
        return Image.fromarray(self.image)


# -------------------------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scenes:
    """The scenes of one split: `Scenes("test")[7]` is always the same scene.

    `canvas` and `patch` are in pixels, `things` is the smallest and largest number of things. The evaluation sets use
    the defaults; the first stage of training uses smaller canvases with one or two things.
    """

    split: str
    canvas: int = 128
    patch: int = 8
    things: tuple[int, int] = (3, 6)

    def __post_init__(self) -> None:
        content.check_split(self.split)

    def __getitem__(self, seed: int) -> Scene:
        rng = random.Random(f"{self.split}-{seed}")
        plan, asked = self._plan(rng)
        image = self._background(rng)
        things, coverage = place(rng, image, plan, partial(content.opacity, rng, self.split))
        owner = self._owner(things, coverage)
        image = np.clip(image, 0, 255).astype(np.uint8)
        return Scene(image, tuple(things), owner, tuple(_ask(rng, things, self.canvas, asked)))

    def _plan(self, rng: random.Random) -> tuple[list[tuple[str, str]], int]:
        """What goes into the scene, as (kind, name), and the count the counting question should have as its answer."""
        total = rng.randint(*self.things)
        asked = rng.randint(0, MAX_COUNT)  # drawn first, so that all counts are equally frequent answers
        if self.things[1] <= 2:
            drawn = rng.choice(["shape", "shape", "digit", "word"] if total == 1 else ["ss", "sd", "sw", "dw"])
            kinds = [drawn] if total == 1 else [{"s": "shape", "d": "digit", "w": "word"}[k] for k in drawn]
            shapes, digits, words = (kinds.count(kind) for kind in ("shape", "digit", "word"))
        else:
            digits, words = rng.choice([0, 1, 1, 2]), rng.choice([0, 1])
            shapes = max(1, total - digits - words)
            if asked >= 2:
                shapes = max(shapes, asked)
                digits = min(digits, max(0, self.things[1] - shapes - words))
        names = [rng.choice(SHAPES) for _ in range(shapes)]
        if 2 <= asked <= shapes:
            names[:asked] = [names[0]] * asked
        plan = [("shape", name) for name in names]
        plan += [("digit", rng.choice(DIGITS)) for _ in range(digits)]
        rng.shuffle(plan)
        return [("word", rng.choice(WORDS)) for _ in range(words)] + plan, asked  # the widest things find room first

    def _background(self, rng: random.Random) -> np.ndarray:
        """(canvas, canvas, 3) float32."""
        size = self.canvas
        crop = content.cut(rng, content.source(rng, self.split, size * 3 // 2), size, size)
        if rng.random() < 0.5:
            crop = crop.transpose(1, 0, 2)
        return content.shaded(rng, crop)

    def _owner(self, things: list[Thing], coverage: np.ndarray) -> np.ndarray:
        """The thing with most pixels in each patch, if it covers more than a tenth of it."""
        side = self.canvas // self.patch
        cells = coverage.reshape(side, self.patch, side, self.patch).transpose(0, 2, 1, 3).reshape(side, side, -1)
        pixels = np.stack([(cells == i).sum(-1) for i in range(1, len(things) + 1)])  # (things, side, side)
        return np.where(pixels.max(0) > int(0.1 * self.patch**2), pixels.argmax(0) + 1, 0)


def place(
    rng: random.Random, image: np.ndarray, plan: Sequence[tuple[str, str]], form: Callable[[str, str], np.ndarray]
) -> tuple[list[Thing], np.ndarray]:
    """Paint things onto `image` (H, W, 3) float32 (in place). Also returns the owner of every pixel, (H, W) int16.

    `plan` has the kind and the name of each, of which `form` makes its opacity. A thing that finds no free place in 60
    tries is left out: the questions look at what was placed.
    """
    things: list[Thing] = []
    height, width, _ = image.shape
    owner = np.zeros((height, width), np.int16)
    for kind, name in plan:
        mask = form(kind, name)
        tall, wide = mask.shape
        for _ in range(60):
            left, top = rng.randint(0, width - wide), rng.randint(0, height - tall)
            box = (left, top, left + wide, top + tall)
            if all(apart(box, other.box, GAP) for other in things):
                break
        else:
            continue
        colour = rng.choice(list(COLOURS))
        tint = np.clip(np.array(COLOURS[colour]) + [rng.uniform(-16, 16) for _ in range(3)], 0, 255)
        rows, columns = slice(box[1], box[3]), slice(box[0], box[2])
        under = image[rows, columns] * (0.35 if kind == "word" else 1.0)  # words stand on a darkened plate
        image[rows, columns] = under + mask[..., None] * (tint.astype(np.float32) - under)
        things.append(Thing(kind, name, colour, box))
        owner[rows, columns][(mask > 0.4) | (kind == "word")] = len(things)
    return things, owner


# ----------------------------------------------------------------------------------------------------------- questions


def _ask(rng: random.Random, things: list[Thing], canvas: int, asked: int) -> Iterator[Question]:
    """All questions about a scene that have exactly one right answer; `asked` is the count to ask for if possible."""
    shapes, digits, words = ([t for t in things if t.kind == kind] for kind in ("shape", "digit", "word"))
    counts = Counter(shape.name for shape in shapes)
    single = [shape for shape in shapes if counts[shape.name] == 1]

    for group, noun in ((digits, "digit"), (shapes, "shape")):
        tints = Counter(thing.colour for thing in group)
        for thing in group:
            if tints[thing.colour] == 1:
                wh = "What" if noun == "digit" else "Which"
                yield Question(noun, f"{wh} {noun} is {thing.colour}?", thing.name)
    for shape in single:
        yield Question("colour", f"What colour is the {shape.name}?", shape.colour)
        x, y = (c / canvas - 0.5 for c in shape.centre)
        if min(abs(x), abs(y)) > 0.07:
            place = f"{'top' if y < 0 else 'bottom'}-{'left' if x < 0 else 'right'}"
            yield Question("where", f"Where is the {shape.name}?", place)
    if len(digits) == 1:
        yield Question("colour", "What colour is the digit?", digits[0].colour)
    for word in words:
        yield Question("word", "What word is written?", word.name)
        yield Question("colour", "What colour is the word?", word.colour)

    wanted = [name for name in SHAPES if counts[name] == asked]
    if wanted:
        yield Question("count", f"How many {PLURALS[rng.choice(wanted)]} are there?", str(asked))
    if shapes:
        yield ask_existence(rng, shapes, things)
        relations = list(ask_relations(shapes, canvas, canvas))
        yield from rng.sample(relations, min(3, len(relations)))


def ask_existence(
    rng: random.Random, shapes: Sequence[Thing], things: Sequence[Thing], wanted: bool | None = None
) -> Question:
    """With the answer that is wanted, or half yes, half no. Most of the colours asked for in vain are there, but on
    something else."""
    shape = rng.choice(shapes)
    colour = shape.colour
    wanted = rng.random() >= 0.5 if wanted is None else wanted
    if not wanted:
        present = {other.colour for other in shapes if other.name == shape.name}
        absent = [c for c in COLOURS if c not in present]
        elsewhere = [thing.colour for thing in things if thing.colour in absent]
        colour = rng.choice(elsewhere if elsewhere and rng.random() < 0.7 else absent)
    article = "an" if colour[0] in "aeiou" else "a"
    return Question("exist", f"Is there {article} {colour} {shape.name}?", "yes" if wanted else "no")


def ask_relations(shapes: Sequence[Thing], height: int, width: int) -> Iterator[Question]:
    """Questions for the one kind of shape on one side of another, clearly on that side (8 % of the picture)."""
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


# ----------------------------------------------------------------------------------------------------- evaluation sets


def questions(split: str = "test", limit: int | None = None) -> Iterator[Item]:
    """The evaluation set of a split: at most five questions about each of 500 scenes, scene after scene.

    Of each scene at most one question per type is taken, first those of which the set so far has the fewest, by type,
    then by answer; so the types, and the answers of a type, come out about equally often. `limit` questions are the
    first `limit` of the whole set; 500 of them cover about 100 scenes.
    """
    scenes = Scenes(split)
    # The seeds of training start at 0 and end far below a billion.
    drawn = ((index, scenes[1_000_000_000 + index]) for index in range(EVAL_SCENES))
    return balanced(((index, scene, (scene.pil,)) for index, scene in drawn), QUESTIONS_PER_SCENE, limit)
