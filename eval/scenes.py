"""Procedural question answering about pictures: a small task with exact answers, made in memory.

A scene is a 128 x 128 canvas with three to six things on a textured or photographic background: shapes, handwritten
digits and three-letter words, each in one of eight colours. Things cover about 15 % of the patches of 8 x 8 pixels, so
questions can be answered from few visual tokens, but only from the right ones. Everything is a pure function of
(split, seed).

The splits share the vocabulary (shapes, colours, words, typefaces) and nothing else: the images of digits, the
background textures, the photographs and the seeds of `train`, `val` and `test` are disjoint.

The real content (digits, rendered words, photographs) comes from `assets/scenes.npz`; `assets/LICENSES.md` names its
sources and `training/make_assets.py` in the repository builds it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 220, 50),
    "purple": (150, 50, 190),
    "orange": (245, 140, 30),
    "cyan": (50, 210, 220),
    "pink": (250, 130, 190),
}
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "heart": "hearts",
    "diamond": "diamonds",
    "ring": "rings",
}
SHAPES = tuple(PLURALS)
DIGITS = tuple("0123456789")
WORDS = ("cat", "dog", "sun", "car", "tea", "map", "box", "key", "hat", "cup", "bus", "egg", "fox", "jam", "owl", "pen")
SIDES = ("left of", "right of", "above", "below")
QUESTION_TYPES = ("digit", "colour", "shape", "where", "word", "count", "exist", "relation")
SPLITS = ("train", "val", "test")

SHAPE_SIZES = range(15, 30)  # pixels
DIGIT_SIZES = range(17, 30)
WORD_SIZES = range(13, 20)  # nominal height of the typeface
TYPEFACES = 3
MAX_COUNT = 4
TEXTURES = {"train": 400, "val": 80, "test": 80}
PHOTO_SHARE = 0.2  # of the backgrounds
DIGIT_SLICES = {"train": slice(0, 1300), "val": slice(1300, 1450), "test": slice(1450, None)}
EVAL_SCENES = 500  # scenes behind `questions(split)`
QUESTIONS_PER_SCENE = 5


@dataclass(frozen=True)
class Thing:
    """One object of a scene; `box` is (left, top, right, bottom) in pixels, right and bottom exclusive."""

    kind: str  # "shape", "digit" or "word"
    name: str  # "square", "7", "cat"
    colour: str
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the middle of the box, in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Question:
    """One question with its only right answer, which is one word."""

    type: str  # one of QUESTION_TYPES
    text: str
    answer: str


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


@dataclass(frozen=True)
class Item:
    """One line of an evaluation set."""

    image: Image.Image
    question: str
    answer: str
    type: str
    index: int  # of the scene: items with the same index share their picture
    scene: Scene = field(repr=False)


# ------------------------------------------------------------------------------------------------------------- content


@functools.cache
def _assets() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "assets" / "scenes.npz") as stored:
        return dict(stored)


@functools.cache
def _digits(split: str) -> tuple[tuple[np.ndarray, ...], ...]:
    """Per class 0-9, the images (8, 8) of a split, float32 in [0, 1]."""
    images, labels = (_assets()[name][DIGIT_SLICES[split]] for name in ("digits", "digit_labels"))
    return tuple(tuple(images[labels == k].astype(np.float32) / 16) for k in range(10))


@functools.cache
def _word_mask(word: int, typeface: int, size: int) -> np.ndarray:
    """Opacity (h, w) of a rendered word, float32 in [0, 1]; the three arguments are indices."""
    assets = _assets()
    shapes = assets["word_shapes"].astype(np.int64)  # (words, typefaces, sizes, 2)
    ends = shapes.prod(-1).ravel().cumsum().reshape(shapes.shape[:3])
    height, width = shapes[word, typeface, size]
    end = ends[word, typeface, size]
    return assets["word_pixels"][end - height * width : end].reshape(height, width).astype(np.float32) / 255


@functools.cache
def _photos(split: str) -> tuple[np.ndarray, ...]:
    """Photographs of a split, (h, w, 3) float32 in 0-255, made paler so that the coloured things stay readable."""
    photos = []
    for name in sorted(name for name in _assets() if name.startswith(f"photo_{split}_")):
        photo = np.asarray(Image.open(io.BytesIO(_assets()[name].tobytes())).convert("RGB"), np.float32)
        grey = photo.mean(-1, keepdims=True)
        photo = grey + 0.45 * (photo - grey)
        mean = photo.mean()
        photos.append(min(max(mean, 75.0), 175.0) + 0.6 * (photo - mean))
    return tuple(photos)


@functools.cache
def _texture(split: str, index: int, side: int) -> np.ndarray:
    """Coloured noise in several octaves with dull strokes and blobs on it, (side, side, 3) uint8."""
    # RandomState, because NumPy guarantees its streams for good; those of Generator may change with a release.
    rng = np.random.RandomState([SPLITS.index(split), index])
    base = rng.uniform(60, 190, 3)
    out = np.zeros((side, side, 3), np.float32) + base.mean() + 0.5 * (base - base.mean())
    for cells in (3, 6, 12, 24, 48, 96):
        noise = rng.normal(0, 1, (cells, cells, 1)) * rng.uniform(6, 20) * np.ones(3)
        noise = (noise + rng.normal(0, 1, (cells, cells, 3)) * rng.uniform(1, 7)).astype(np.float32)
        smooth = [
            np.asarray(Image.fromarray(noise[..., c]).resize((side, side), Image.Resampling.BICUBIC)) for c in range(3)
        ]
        out += np.stack(smooth, -1) * (1.3 if cells < 20 else 0.7)
    image = Image.fromarray(np.clip(out, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(6, 22)):
        grey = rng.uniform(40, 210)
        colour = tuple(int(v) for v in np.clip(grey + rng.normal(0, 12, 3), 0, 255))
        x, y = (int(v) for v in rng.randint(0, side, 2))
        length, angle = int(rng.randint(3, 24)), rng.uniform(0, 2 * math.pi)
        if rng.uniform() < 0.6:
            tip = (x + length * math.cos(angle), y + length * math.sin(angle))
            draw.line((x, y, *tip), fill=colour, width=int(rng.randint(1, 4)))
        else:
            radius = length / 5
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return np.asarray(image)


@functools.cache
def _shape_mask(name: str, size: int) -> np.ndarray:
    """Opacity (size, size) of a shape, float32 in [0, 1], drawn four times as large and scaled down."""
    side = size * 4
    image = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(image)
    low, high = 2, side - 3
    if name == "circle":
        draw.ellipse((low, low, high, high), fill=255)
    elif name == "ring":
        hole = side * 0.27
        draw.ellipse((low, low, high, high), fill=255)
        draw.ellipse((hole, hole, side - 1 - hole, side - 1 - hole), fill=0)
    elif name == "square":
        margin = side * 0.08
        draw.rectangle((margin, margin, side - 1 - margin, side - 1 - margin), fill=255)
    elif name == "triangle":
        draw.polygon([(side / 2, low), (high, high), (low, high)], fill=255)
    elif name == "diamond":
        draw.polygon([(side / 2, low), (side * 0.82, side / 2), (side / 2, high), (side * 0.18, side / 2)], fill=255)
    elif name == "cross":
        arm = side * 0.32
        draw.rectangle((arm, low, side - 1 - arm, high), fill=255)
        draw.rectangle((low, arm, high, side - 1 - arm), fill=255)
    elif name == "star":
        corners = []
        for i in range(10):
            radius, angle = side / 2 * (1 if i % 2 == 0 else 0.42), i * math.pi / 5 - math.pi / 2
            corners.append((side / 2 + radius * math.cos(angle), side / 2 + radius * math.sin(angle)))
        draw.polygon(corners, fill=255)
    elif name == "heart":
        lobe, top = side * 0.54, side * 0.08
        draw.ellipse((low, top, low + lobe, top + lobe), fill=255)
        draw.ellipse((high - lobe, top, high, top + lobe), fill=255)
        draw.polygon([(side * 0.04, side * 0.44), (side * 0.96, side * 0.44), (side / 2, high)], fill=255)
    else:
        raise ValueError(f"unknown shape {name!r}; one of {', '.join(SHAPES)}")
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS), np.float32) / 255


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
        if self.split not in SPLITS:
            raise ValueError(f"unknown split {self.split!r}; one of {', '.join(SPLITS)}")

    def __getitem__(self, seed: int) -> Scene:
        rng = random.Random(f"{self.split}-{seed}")
        plan, asked = self._plan(rng)
        image = self._background(rng)
        things, coverage = self._place(rng, plan, image)
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
        if rng.random() < PHOTO_SHARE:
            source = rng.choice(_photos(self.split))
        else:
            source = _texture(self.split, rng.randrange(TEXTURES[self.split]), size * 3 // 2)
        top, left = rng.randint(0, source.shape[0] - size), rng.randint(0, source.shape[1] - size)
        crop = source[top : top + size, left : left + size]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        if rng.random() < 0.5:
            crop = crop[::-1]
        if rng.random() < 0.5:
            crop = crop.transpose(1, 0, 2)
        return crop.astype(np.float32) * rng.uniform(0.8, 1.15) + rng.uniform(-15, 15)

    def _opacity(self, rng: random.Random, kind: str, name: str) -> np.ndarray:
        """The form of one thing, (h, w) float32 in [0, 1]."""
        if kind == "shape":
            return _shape_mask(name, rng.choice(SHAPE_SIZES))
        if kind == "word":
            return _word_mask(WORDS.index(name), rng.randrange(TYPEFACES), rng.randrange(len(WORD_SIZES)))
        size = rng.choice(DIGIT_SIZES)
        digit = Image.fromarray(rng.choice(_digits(self.split)[int(name)])).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        return np.clip(np.asarray(digit) * 1.25 - 0.1, 0, 1)

    def _place(
        self, rng: random.Random, plan: list[tuple[str, str]], image: np.ndarray
    ) -> tuple[list[Thing], np.ndarray]:
        """Paint the plan onto `image` (in place). Also returns the owner of every pixel, (canvas, canvas) int16.

        A thing that finds no free place in 60 tries is left out: the questions look at what was placed.
        """
        things: list[Thing] = []
        coverage = np.zeros((self.canvas, self.canvas), np.int16)
        for kind, name in plan:
            opacity = self._opacity(rng, kind, name)
            height, width = opacity.shape
            for _ in range(60):
                left, top = rng.randint(0, self.canvas - width), rng.randint(0, self.canvas - height)
                box = (left, top, left + width, top + height)
                if all(_apart(box, other.box, gap=3) for other in things):
                    break
            else:
                continue
            colour = rng.choice(list(COLOURS))
            tint = np.clip(np.array(COLOURS[colour]) + [rng.uniform(-16, 16) for _ in range(3)], 0, 255)
            rows, columns = slice(box[1], box[3]), slice(box[0], box[2])
            under = image[rows, columns] * (0.35 if kind == "word" else 1.0)  # words stand on a darkened plate
            image[rows, columns] = under + opacity[..., None] * (tint.astype(np.float32) - under)
            things.append(Thing(kind, name, colour, box))
            coverage[rows, columns][(opacity > 0.4) | (kind == "word")] = len(things)
        return things, coverage

    def _owner(self, things: list[Thing], coverage: np.ndarray) -> np.ndarray:
        """The thing with most pixels in each patch, if it covers more than a tenth of it."""
        side = self.canvas // self.patch
        cells = coverage.reshape(side, self.patch, side, self.patch).transpose(0, 2, 1, 3).reshape(side, side, -1)
        pixels = np.stack([(cells == i).sum(-1) for i in range(1, len(things) + 1)])  # (things, side, side)
        return np.where(pixels.max(0) > int(0.1 * self.patch**2), pixels.argmax(0) + 1, 0)


def _apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int], gap: int) -> bool:
    return a[2] + gap <= b[0] or b[2] + gap <= a[0] or a[3] + gap <= b[1] or b[3] + gap <= a[1]


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
        yield _ask_existence(rng, shapes, {(thing.name, thing.colour) for thing in shapes}, things)
        relations = list(_ask_relations(shapes, single, canvas))
        yield from rng.sample(relations, min(3, len(relations)))


def _ask_existence(
    rng: random.Random, shapes: list[Thing], present: set[tuple[str, str]], things: list[Thing]
) -> Question:
    """Half yes, half no; most of the colours asked for in vain are in the picture, but on something else."""
    shape = rng.choice(shapes)
    name, colour, answer = shape.name, shape.colour, "yes"
    if rng.random() < 0.5:
        absent = [c for c in COLOURS if (name, c) not in present]
        elsewhere = [thing.colour for thing in things if thing.colour in absent]
        colour, answer = rng.choice(elsewhere if elsewhere and rng.random() < 0.7 else absent), "no"
    return Question("exist", f"Is there {'an' if colour[0] in 'aeiou' else 'a'} {colour} {name}?", answer)


def _ask_relations(shapes: list[Thing], single: list[Thing], canvas: int) -> Iterator[Question]:
    """Questions for the one kind of shape on one side of another, clearly on that side (8 % of the canvas)."""
    for shape in single:
        for side in SIDES:
            axis, sign = (0 if side in SIDES[:2] else 1), (-1 if side in ("left of", "above") else 1)
            beyond = {
                other: distance
                for other in shapes
                if (distance := sign * (other.centre[axis] - shape.centre[axis])) > 0 and other is not shape
            }
            if len({other.name for other in beyond}) == 1 and min(beyond.values()) > 0.08 * canvas:
                answer = next(iter(beyond)).name
                yield Question("relation", f"Which shape is {side} the {shape.name}?", answer)


# ----------------------------------------------------------------------------------------------------- evaluation sets


def questions(split: str = "test", limit: int | None = None) -> Iterator[Item]:
    """The evaluation set of a split: at most five questions about each of 500 scenes, scene after scene.

    Of each scene at most one question per type is taken, first those of which the set so far has the fewest, by type,
    then by answer; so the types, and the answers of a type, come out about equally often. `limit` questions are the
    first `limit` of the whole set; 500 of them cover about 100 scenes.
    """
    scenes = Scenes(split)
    types: Counter[str] = Counter()
    answers: Counter[tuple[str, str]] = Counter()
    made = 0
    for index in range(EVAL_SCENES):
        # The seeds of training start at 0 and end far below a billion.
        scene = scenes[1_000_000_000 + index]
        image = scene.pil
        ranked = sorted(scene.questions, key=lambda q: (types[q.type], answers[q.type, q.answer]))
        best = {question.type: question for question in reversed(ranked)}
        for question in sorted(best.values(), key=lambda q: types[q.type])[:QUESTIONS_PER_SCENE]:
            if made == limit:
                return
            types[question.type] += 1
            answers[question.type, question.answer] += 1
            made += 1
            yield Item(image, question.text, question.answer, question.type, index, scene)


def digest(items: Iterable[Item]) -> str:
    """SHA-256 over the pictures, questions and answers, in order: two equal digests mean the same evaluation."""
    total = hashlib.sha256()
    for item in items:
        total.update(item.scene.image.tobytes())
        total.update(f"{item.index}\t{item.type}\t{item.question}\t{item.answer}\n".encode())
    return total.hexdigest()


def majority(items: Iterable[Item]) -> float:
    """Accuracy of the best answer that looks at the question's type only: what can be had without the picture."""
    answers: dict[str, Counter[str]] = {}
    for item in items:
        answers.setdefault(item.type, Counter())[item.answer] += 1
    total = sum(sum(counts.values()) for counts in answers.values())
    return sum(max(counts.values()) for counts in answers.values()) / max(1, total)
