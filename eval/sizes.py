"""Questions about pictures of many sizes and about short clips, for models that see media at their own resolution.

A picture has sides of 64 to 192 pixels, each a multiple of 16, and more things the larger it is. A clip has 4 to 16
frames of 64 x 64 to 64 x 128 pixels before a background that stands still; shapes come one after the other, leave or
stay, and some of them move. Nothing is scaled: things are as large in pixels on a small picture as on a large one.
Everything is a pure function of (split, seed).

The splits share the vocabulary and nothing else: their seeds are disjoint, and so is their content (`content.py`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vtc.eval import content, scenes
from vtc.eval.content import COLOURS, DIGITS, PLURALS, SHAPES, WORDS, Box, apart
from vtc.eval.items import Item, Medium, Question, balanced
from vtc.eval.scenes import GAP, SIDES, ask_existence

QUESTION_TYPES = (
    "digit", "colour", "shape", "where", "word", "count", "exist", "relation", "order", "motion",
)  # fmt: skip
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CELL = 16  # pixels; all sides are multiples of it
PATCH = 8
LARGEST = 96  # cells of a picture
CLIPS = (
    (4, 64, 64), (6, 64, 64), (8, 64, 64), (4, 64, 96), (6, 96, 64),
    (8, 64, 80), (8, 80, 64), (12, 64, 96), (12, 96, 64), (16, 64, 128),
)  # fmt: skip
CLIP_SHARE = 0.35  # of the media of an evaluation set
MAX_COUNT = 4
BACKGROUND = 256  # side of a texture, in pixels
NEAR = 10  # pixels: closer to a middle line, or to each other, things are not asked where they are
EVAL_SCENES = 600  # media behind `questions(split)`
QUESTIONS_PER_SCENE = 4


@dataclass(frozen=True)
class Thing(scenes.Thing):
    """One object of a scene; its box is where it is first seen."""

    seen: tuple[int, int] = (0, 1)  # first frame, and the frame after the last one
    way: str = ""  # one of WAYS, if it moves
    speed: int = 0  # pixels per frame

    def shift(self, frame: int) -> tuple[int, int]:
        """(x, y) in pixels by which it has moved in `frame`."""
        x, y = WAYS.get(self.way, (0, 0))
        far = self.speed * (frame - self.seen[0])
        return x * far, y * far

    @property
    def swept(self) -> Box:
        """The smallest box around all places it takes."""
        x, y = self.shift(self.seen[1] - 1)
        left, top, right, bottom = self.box
        return left + min(x, 0), top + min(y, 0), right + max(x, 0), bottom + max(y, 0)


@dataclass(frozen=True)
class Scene:
    """A picture or a clip, what is in it, and what can be asked about it."""

    frames: np.ndarray  # (F, H, W, 3) uint8; a picture has one
    things: tuple[Thing, ...]
    owner: np.ndarray  # (ceil(F / 2), H / PATCH, W / PATCH) int64: 0 is background, i + 1 is things[i]
    questions: tuple[Question, ...]

    @property
    def medium(self) -> Medium:
        """A picture as a PIL image, a clip as its frames."""
        return Image.fromarray(self.frames[0]) if len(self.frames) == 1 else self.frames


def layout(rng: random.Random, clip: bool) -> tuple[int, int, int]:
    """Number of frames, height and width in pixels of a random medium."""
    if clip:
        return rng.choice(CLIPS)
    while True:
        rows, columns = rng.randint(4, 12), rng.randint(4, 12)
        if rows * columns <= LARGEST:
            return 1, rows * CELL, columns * CELL


@dataclass(frozen=True)
class Scenes:
    """The scenes of one split: `Scenes("test")[7]` is always the same scene.

    With `size` (frames, height, width) all have that size; else the seed decides. `things` limits their number in
    pictures; else the area decides. Training uses both.
    """

    split: str
    size: tuple[int, int, int] | None = None
    things: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        content.check_split(self.split)
        if self.size and (self.size[1] % CELL or self.size[2] % CELL):
            raise ValueError(f"height and width have to be multiples of {CELL}, not {self.size[1]} and {self.size[2]}")

    def __getitem__(self, seed: int) -> Scene:
        rng = random.Random(f"sizes-{self.split}-{seed}")
        size = self.size or layout(rng, rng.random() < CLIP_SHARE)
        return self._picture(rng, size) if size[0] == 1 else self._clip(rng, size)

    # ------------------------------------------------------------------------------------------------------- pictures

    def _picture(self, rng: random.Random, size: tuple[int, int, int]) -> Scene:
        _, height, width = size
        plan, asked = self._plan(rng, height * width // CELL**2)
        things: list[Thing] = []
        forms = []
        for kind, name in plan:
            form = content.opacity(rng, self.split, kind, name)
            for _ in range(60):
                box = _somewhere(rng, form, height, width)
                if box and all(apart(box, other.box, GAP) for other in things):
                    things.append(Thing(kind, name, rng.choice(list(COLOURS)), box))
                    forms.append(form)
                    break
        frames, owner = self._paint(rng, size, things, forms)
        return Scene(frames, tuple(things), owner, tuple(_ask_picture(rng, things, height, width, asked)))

    def _plan(self, rng: random.Random, cells: int) -> tuple[list[tuple[str, str]], int]:
        """What goes into the picture, as (kind, name), and the count the counting question should have as its answer.

        A thing that finds no room is left out later: the questions look at what was placed.
        """
        fewest, most = self.things or (max(1, round(cells / 24)), max(2, min(6, round(cells / 11))))
        total = rng.randint(fewest, most)
        # Drawn first, so that counts are about equally frequent answers; large ones find room in large pictures only.
        asked = rng.choices(range(MAX_COUNT + 1), (3, 3, 2, 2, 2))[0]
        asked = asked if asked <= most else rng.randint(0, 1)
        several = asked if asked >= 2 else 3 if most >= 3 and rng.random() < 0.7 else 0
        total = max(total, several)
        kinds = [rng.choices(("shape", "digit", "word"), (4, 2, 4))[0] for _ in range(total)]
        kinds[:several] = ["shape"] * several
        # A second word would make questions about "the word" ambiguous.
        kinds = ["shape" if kind == "word" and "word" in kinds[:i] else kind for i, kind in enumerate(kinds)]
        names = {"shape": SHAPES, "digit": DIGITS, "word": WORDS}
        plan = [(kind, rng.choice(names[kind])) for kind in kinds]
        if asked >= 2:
            plan[:several] = [plan[0]] * several
        else:  # three different shapes, to ask which is on one side of another
            plan[:several] = [("shape", name) for name in rng.sample(SHAPES, several)]
        rng.shuffle(plan)
        return sorted(plan, key=lambda thing: thing[0] != "word"), asked  # the widest things find room first

    # ---------------------------------------------------------------------------------------------------------- clips

    def _clip(self, rng: random.Random, size: tuple[int, int, int]) -> Scene:
        length, height, width = size
        steps = length // 2  # things come and go between pairs of frames
        count = min(steps, rng.choice((2, 2, 3)) if self.things is None else rng.randint(*self.things))
        names: list[tuple[str, str]] = [("shape", name) for name in rng.sample(SHAPES, count)]
        births = [0, *sorted(rng.sample(range(1, steps), count - 1))]
        ends = [*births[1:], steps]
        lives = []
        for birth, following in zip(births, ends, strict=True):
            latest = min(steps, following + 1) if rng.random() < 0.7 else steps
            lives.append((2 * birth, 2 * rng.randint(birth + 1, latest)))
        if rng.random() < 0.4:
            names.append(("digit", rng.choice(DIGITS)))
            lives.append((0, length))
        things: list[Thing] = []
        forms = []
        for (kind, name), seen in zip(names, lives, strict=True):
            form = content.opacity(rng, self.split, kind, name)
            way = rng.choice(list(WAYS)) if kind == "shape" and rng.random() < 0.7 else ""
            colour = rng.choice(list(COLOURS))
            # Long ways do not fit into small pictures: slower ones are tried too, and in the end none.
            for attempt in range(60):
                moves = way if attempt < 45 else ""
                speed = max(2, 4 - attempt // 15) if moves else 0
                box = _somewhere(rng, form, height, width)
                if box is None:
                    break
                thing = Thing(kind, name, colour, box, seen, moves, speed)
                left, top, right, bottom = thing.swept
                inside = left >= 0 and top >= 0 and right <= width and bottom <= height
                if inside and all(apart(thing.swept, other.swept, GAP) or _alone(seen, other.seen) for other in things):
                    things.append(thing)
                    forms.append(form)
                    break
        frames, owner = self._paint(rng, size, things, forms)
        return Scene(frames, tuple(things), owner, tuple(_ask_clip(rng, things)))

    # ------------------------------------------------------------------------------------------------------- painting

    def _background(self, rng: random.Random, height: int, width: int) -> np.ndarray:
        """(height, width, 3) float32."""
        source = content.source(rng, self.split, BACKGROUND)
        return content.shaded(rng, content.cut(rng, source, height, width))

    def _paint(
        self, rng: random.Random, size: tuple[int, int, int], things: list[Thing], forms: list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Frames (F, H, W, 3) uint8 and the owner of every patch of every pair of frames."""
        length, height, width = size
        frames = np.repeat(self._background(rng, height, width)[None], length, 0)
        pixels = np.zeros((len(things) + 1, length, height, width), bool)  # which thing covers a pixel
        for i, (thing, form) in enumerate(zip(things, forms, strict=True)):
            tint = np.clip(np.array(COLOURS[thing.colour]) + [rng.uniform(-16, 16) for _ in range(3)], 0, 255)
            plate = 0.35 if thing.kind == "word" else 1.0  # words stand on a darkened plate
            for frame in range(*thing.seen):
                x, y = thing.shift(frame)
                rows = slice(thing.box[1] + y, thing.box[3] + y)
                columns = slice(thing.box[0] + x, thing.box[2] + x)
                under = frames[frame, rows, columns] * plate
                frames[frame, rows, columns] = under + form[..., None] * (tint.astype(np.float32) - under)
                pixels[i + 1, frame, rows, columns] = (form > 0.4) | (thing.kind == "word")
        # The thing with most pixels in a patch, if it covers more than a tenth of it.
        pairs = max(1, length // 2)
        share = pixels.reshape(len(pixels), pairs, -1, height // PATCH, PATCH, width // PATCH, PATCH).mean((2, 4, 6))
        share[0] = 0.1
        return np.clip(frames, 0, 255).astype(np.uint8), share.argmax(0)


def _somewhere(rng: random.Random, form: np.ndarray, height: int, width: int) -> Box | None:
    """A random place for a form, None if it is larger than the picture."""
    rows, columns = form.shape
    if rows > height or columns > width:
        return None
    left, top = rng.randint(0, width - columns), rng.randint(0, height - rows)
    return left, top, left + columns, top + rows


def _alone(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether one has left before the other comes."""
    return a[1] <= b[0] or b[1] <= a[0]


# ----------------------------------------------------------------------------------------------------------- questions


def _ask_names(things: list[Thing]) -> Iterator[Question]:
    """What has a colour, and what colour something has; wherever there is exactly one such thing."""
    for noun, wh in (("digit", "What"), ("shape", "Which")):
        tints = Counter(thing.colour for thing in things if thing.kind == noun)
        for thing in things:
            if thing.kind == noun and tints[thing.colour] == 1:
                yield Question(noun, f"{wh} {noun} is {thing.colour}?", thing.name)
    names = Counter(thing.name if thing.kind == "shape" else thing.kind for thing in things)
    for thing in things:
        noun = thing.name if thing.kind == "shape" else thing.kind
        if names[noun] == 1:
            yield Question("colour", f"What colour is the {noun}?", thing.colour)


def _ask_existence(rng: random.Random, things: list[Thing]) -> Iterator[Question]:
    shapes = [thing for thing in things if thing.kind == "shape"]
    if shapes:
        yield ask_existence(rng, shapes, things)


def _ask_picture(rng: random.Random, things: list[Thing], height: int, width: int, asked: int) -> Iterator[Question]:
    """All questions about a picture that have one right answer; `asked` is the count to ask for if possible."""
    yield from _ask_names(things)
    yield from _ask_existence(rng, things)
    shapes = [thing for thing in things if thing.kind == "shape"]
    counts = Counter(shape.name for shape in shapes)
    single = [shape for shape in shapes if counts[shape.name] == 1]
    for shape in single:
        x, y = shape.centre[0] - width / 2, shape.centre[1] - height / 2
        if min(abs(x), abs(y)) >= NEAR:
            place = f"{'top' if y < 0 else 'bottom'}-{'left' if x < 0 else 'right'}"
            yield Question("where", f"Where is the {shape.name}?", place)
    for thing in things:
        if thing.kind == "word":
            yield Question("word", "What word is written?", thing.name)
    wanted = [name for name in SHAPES if counts[name] == asked]
    if wanted:
        yield Question("count", f"How many {PLURALS[rng.choice(wanted)]} are there?", str(asked))
    relations = list(_ask_relations(shapes, single))
    yield from rng.sample(relations, min(3, len(relations)))


def _ask_relations(shapes: list[Thing], single: list[Thing]) -> Iterator[Question]:
    """Questions for the one kind of shape on one side of another, clearly on that side, where others are elsewhere."""
    for shape in single:
        if len({other.name for other in shapes}) < 3:
            continue  # the other kind would be the answer whatever the side
        for side in SIDES:
            axis, sign = (0 if side in SIDES[:2] else 1), (-1 if side in ("left of", "above") else 1)
            ahead = [(sign * (other.centre[axis] - shape.centre[axis]), other.name) for other in shapes]
            beyond = [(distance, name) for distance, name in ahead if distance > 0]
            if len({name for _, name in beyond}) == 1 and min(beyond)[0] >= NEAR:
                yield Question("relation", f"Which shape is {side} the {shape.name}?", beyond[0][1])


def _ask_clip(rng: random.Random, things: list[Thing]) -> Iterator[Question]:
    """All questions about a clip that have one right answer; its shapes are all different."""
    yield from _ask_names(things)
    yield from _ask_existence(rng, things)
    shapes = sorted((thing for thing in things if thing.kind == "shape"), key=lambda thing: thing.seen[0])
    if len(shapes) > 1:
        yield Question("order", "Which shape appears first?", shapes[0].name)
        yield Question("order", "Which shape appears last?", shapes[-1].name)
    for shape in shapes:
        if shape.way:
            yield Question("motion", f"Which way does the {shape.name} move?", shape.way)


# ----------------------------------------------------------------------------------------------------- evaluation sets


def questions(split: str = "test", limit: int | None = None) -> Iterator[Item]:
    """The evaluation set of a split: at most four questions about each of 600 media, one medium after the other.

    Types, and the answers of a type, come out about equally often, as `items.balanced` says. `limit` questions are the
    first `limit` of the whole set.
    """
    scenes = Scenes(split)
    # The seeds of training start at 0 and end far below a billion.
    made = ((index, scenes[1_000_000_000 + index]) for index in range(EVAL_SCENES))
    return balanced(((index, scene, (scene.medium,)) for index, scene in made), QUESTIONS_PER_SCENE, limit)
