"""Procedural question answering about clips and pictures: a small task in which time matters, made in memory.

A clip is 16 to 32 frames of 64 x 64 pixels in one to four scenes. In a scene the background stands still and so do most
things, shapes and handwritten digits in one of eight colours; some appear, vanish, change their colour or move. A cut
replaces everything. Most tokens of most frames therefore say nothing new, and what was asked for may show in few
frames. There are also pictures of one to four tiles and pairs of pictures. Everything is a pure function of
(split, seed); as in `vtc.eval.scenes`, splits share the vocabulary and nothing else.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from vtc.eval import content
from vtc.eval.content import COLOURS, DIGITS, SHAPES, WORDS, Box, apart, check_split
from vtc.eval.items import Item, Medium, Question, balanced

MOVING_TYPES = ("scenes", "inside", "order", "after", "turn", "move")  # need frames
STILL_TYPES = (
    "digit",
    "colour",
    "shape",
    "exist",
    "where",
    "word",
    "which",
    "image",
)  # the first four are asked about clips too
QUESTION_TYPES = MOVING_TYPES + STILL_TYPES
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PLACES = tuple(f"{v}-{h}" for v in ("top", "bottom") for h in ("left", "right"))

TILE = 64  # pixels: a frame, a crop of a picture
PATCH = 8
SCENES = (1, 4)  # in a clip
SHORTEST = 4  # frames of a scene
FRAMES = (16, 32)
SIZES: dict[str, Any] = {"shape_sizes": range(15, 22), "digit_sizes": range(17, 23), "word_sizes": 4}  # of `opacity`
SPEEDS = (3, 4, 5, 6, 7, 8)  # pixels per frame
DISTANCE = (24, 40)  # pixels a moving thing goes
EVAL_FRAMES = (16, 20, 24, 28, 32)  # few lengths, because only clips of one length make a batch
EVAL_SCENES = 540  # clips, pictures and pairs behind `questions(split)`
QUESTIONS_PER_SCENE = 5
PICTURES = ((1, 1), (1, 2), (2, 1), (2, 2))  # tiles down, across


@dataclass(frozen=True)
class Actor:
    """One thing and what becomes of it. Frames are counted from the start of the clip, ends are exclusive."""

    kind: str  # "shape", "digit" or "word"
    name: str
    colour: str
    opacity: np.ndarray  # (h, w) float32 in [0, 1]
    place: tuple[int, int]  # left, top: pixels, in its first frame
    scene: int
    start: int
    end: int
    way: str | None = None  # it moves that way ...
    speed: int = 0  # ... by so many pixels per frame ...
    moving: tuple[int, int] = (0, 0)  # ... during these frames
    later: str | None = None  # the colour it turns ...
    turning: int = 0  # ... in this frame

    def shown(self, frame: int) -> bool:
        return self.start <= frame < self.end

    def colour_at(self, frame: int) -> str:
        return self.later if self.later and frame >= self.turning else self.colour

    def place_at(self, frame: int) -> tuple[int, int]:
        if self.way is None:
            return self.place
        far = self.speed * max(0, min(frame, self.moving[1]) - self.moving[0])
        x, y = WAYS[self.way]
        return self.place[0] + x * far, self.place[1] + y * far

    @property
    def colours(self) -> set[str]:
        return {self.colour, self.later} if self.later else {self.colour}


@dataclass(frozen=True)
class Clip:
    """Frames, what is in them, and what can be asked. A picture is a clip of one frame, of any size in tiles."""

    backgrounds: tuple[np.ndarray, ...]  # per scene (H, W, 3) float32
    cuts: tuple[int, ...]  # first frame of each scene, and the number of frames
    actors: tuple[Actor, ...]
    questions: tuple[Question, ...]

    @property
    def length(self) -> int:
        return self.cuts[-1]

    def scene_at(self, frame: int) -> int:
        return sum(cut <= frame for cut in self.cuts[1:-1])

    @cached_property
    def states(self) -> list[int]:
        """For each frame the index of its picture in `pictures`: frames in which nothing happens share one."""
        known: dict[tuple[object, ...], int] = {}
        return [known.setdefault(self._state(frame), len(known)) for frame in range(self.length)]

    def _state(self, frame: int) -> tuple[object, ...]:
        shown = [(i, a.place_at(frame), a.colour_at(frame)) for i, a in enumerate(self.actors) if a.shown(frame)]
        return (self.scene_at(frame), *shown)

    @cached_property
    def pictures(self) -> tuple[np.ndarray, np.ndarray]:
        """Different pictures (pictures, H, W, 3) uint8, and the owner of every pixel, 0 or 1 + index of the actor."""
        firsts = [self.states.index(i) for i in range(max(self.states) + 1)]
        drawn = [self._draw(frame) for frame in firsts]
        return np.stack([picture for picture, _ in drawn]), np.stack([owner for _, owner in drawn])

    def _draw(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        image = self.backgrounds[self.scene_at(frame)].copy()
        owner = np.zeros(image.shape[:2], np.int64)
        for i, actor in enumerate(self.actors):
            if not actor.shown(frame):
                continue
            (left, top), (height, width) = actor.place_at(frame), actor.opacity.shape
            rows, columns = slice(top, top + height), slice(left, left + width)
            under = image[rows, columns] * (0.35 if actor.kind == "word" else 1.0)  # words stand on a darkened plate
            tint = np.array(COLOURS[actor.colour_at(frame)], np.float32)
            image[rows, columns] = under + actor.opacity[..., None] * (tint - under)
            owner[rows, columns][(actor.opacity > 0.4) | (actor.kind == "word")] = i + 1
        return np.clip(image, 0, 255).astype(np.uint8), owner

    @property
    def frames(self) -> np.ndarray:
        """(frames, H, W, 3) uint8."""
        return self.pictures[0][self.states]

    def owners(self, cell: int) -> np.ndarray:
        """Per picture the actor with most pixels in each cell, if it has a tenth: (pictures, H / cell, W / cell)."""
        owner = self.pictures[1]
        count, height, width = owner.shape
        cells = owner.reshape(count, height // cell, cell, width // cell, cell).transpose(0, 1, 3, 2, 4)
        cells = cells.reshape(count, height // cell, width // cell, -1)
        if not self.actors:
            return np.zeros(cells.shape[:3], np.int64)
        pixels = np.stack([(cells == i + 1).sum(-1) for i in range(len(self.actors))])
        return np.where(pixels.max(0) > 0.1 * cell**2, pixels.argmax(0) + 1, 0)


# ---------------------------------------------------------------------------------------------------------- generation


class _Bag:
    """Draws names without repeating one before all were drawn."""

    def __init__(self, rng: random.Random, names: tuple[str, ...]) -> None:
        self.rng, self.names = rng, names
        self.left: list[str] = []

    def draw(self) -> str:
        if not self.left:
            self.left = self.rng.sample(self.names, len(self.names))
        return self.left.pop()


class _Maker:
    """Makes one clip; keeps what its scenes share."""

    def __init__(self, split: str, rng: random.Random, height: int = TILE, width: int = TILE) -> None:
        self.split, self.rng, self.height, self.width = split, rng, height, width
        self.names = {"shape": _Bag(rng, SHAPES), "digit": _Bag(rng, DIGITS), "word": _Bag(rng, WORDS)}
        self.tints = {kind: _Bag(rng, tuple(COLOURS)) for kind in self.names}
        self.used: set[int] = set()

    def background(self) -> np.ndarray:
        """(height, width, 3) float32."""
        rng, side = self.rng, 3 * TILE
        if rng.random() < content.PHOTO_SHARE:
            source = rng.choice(content.photos(self.split))
        else:
            index = rng.choice([i for i in range(content.TEXTURES[self.split]) if i not in self.used])
            self.used.add(index)
            source = content.texture(self.split, index, side)
        return content.shaded(rng, content.cut(rng, source, self.height, self.width))

    def scene(self, number: int, first: int, last: int, kinds: list[str]) -> list[Actor]:
        """Things for the frames first ... last - 1, none of which ever touches another."""
        rng = self.rng
        actors: list[Actor] = []
        boxes: list[Box] = []
        times = list(range(first + 2, last - 1, 2))
        rng.shuffle(times)
        for kind in kinds:
            name, colour = self.names[kind].draw(), self.tints[kind].draw()
            opacity = content.opacity(rng, self.split, kind, name, **SIZES)
            height, width = opacity.shape
            fate = self.fate(kind, first, last, times)
            far = (fate.get("speed", 0)) * (fate["moving"][1] - fate["moving"][0]) if "moving" in fate else 0
            x, y = WAYS[fate["way"]] if far else (0, 0)
            if fate.get("later") == colour:
                fate["later"] = next(c for c in COLOURS if c != colour)
            for _ in range(40):
                # The box of everything it ever covers, and where in that box it starts.
                box_width, box_height = width + abs(x) * far, height + abs(y) * far
                if box_width > self.width or box_height > self.height:
                    break
                left, top = rng.randint(0, self.width - box_width), rng.randint(0, self.height - box_height)
                box = (left, top, left + box_width, top + box_height)
                if all(apart(box, other, gap=2) for other in boxes):
                    place = (left + far * (x < 0), top + far * (y < 0))
                    boxes.append(box)
                    actors.append(Actor(kind, name, colour, opacity, place, number, **fate))
                    break
        return actors

    def fate(self, kind: str, first: int, last: int, times: list[int]) -> dict[str, Any]:
        """What becomes of a thing; an event takes its time from `times`, so that no two happen at once."""
        rng = self.rng
        fate: dict[str, Any] = {"start": first, "end": last}
        if not times:
            return fate
        if kind == "digit":
            role = rng.choice(["stay", "appear", "appear", "vanish"])
        else:
            role = rng.choice(["stay", "appear", *2 * ["vanish", "turn"], *3 * ["move"]])
        if role == "move":
            if last - first < 7:
                return fate
            frames = rng.randint(4, min(8, last - first - 2))
            begin = rng.randint(first + 1, last - 1 - frames)
            speed = rng.choice([s for s in SPEEDS if DISTANCE[0] <= s * frames <= DISTANCE[1]])
            return fate | {"way": rng.choice(list(WAYS)), "speed": speed, "moving": (begin, begin + frames)}
        if role == "stay":
            return fate
        time = times.pop()
        if role == "turn":
            return fate | {"later": rng.choice(list(COLOURS)), "turning": time}
        return fate | ({"start": time} if role == "appear" else {"end": time})


@dataclass(frozen=True)
class Clips:
    """The clips of one split: `Clips("test")[7]` is always the same one. Training starts with shorter ones."""

    split: str
    frames: tuple[int, int] = FRAMES
    scenes: tuple[int, int] = SCENES

    def __post_init__(self) -> None:
        check_split(self.split)

    def __getitem__(self, seed: int) -> Clip:
        return self.make(seed, None)

    def make(self, seed: int, length: int | None) -> Clip:
        """The clip of a seed, with a given number of frames instead of a drawn one."""
        rng = random.Random(f"clips-{self.split}-{seed}-{length}")
        length = length or rng.randint(*self.frames)
        count = min(rng.randint(*self.scenes), length // SHORTEST)
        spare = length - count * SHORTEST
        marks = sorted(rng.randint(0, spare) for _ in range(count - 1))
        cuts = (0, *(mark + SHORTEST * (i + 1) for i, mark in enumerate(marks)), length)
        maker = _Maker(self.split, rng)
        backgrounds, actors = [], []
        for number in range(count):
            first, last = cuts[number], cuts[number + 1]
            most = 2 if last - first < 8 else 3 if last - first < 14 else 4
            kinds = [rng.choice(["shape", "digit"]) for _ in range(rng.randint(1 if most == 2 else 2, most))]
            backgrounds.append(maker.background())
            actors += maker.scene(number, first, last, kinds)
        asked = tuple(_ask_clip(rng, actors, cuts))
        return Clip(tuple(backgrounds), cuts, tuple(actors), asked)


@dataclass(frozen=True)
class Pictures:
    """The single pictures of one split, of one to four tiles."""

    split: str

    def __post_init__(self) -> None:
        check_split(self.split)

    def __getitem__(self, seed: int) -> Clip:
        return self.make(seed, None)

    def make(self, seed: int, tiles: tuple[int, int] | None) -> Clip:
        """The picture of a seed, with given tiles (down, across) instead of drawn ones."""
        rng = random.Random(f"pictures-{self.split}-{seed}-{tiles}")
        down, across = tiles or rng.choice(PICTURES)
        maker = _Maker(self.split, rng, down * TILE, across * TILE)
        things = rng.randint(1, 3) + (down * across > 1) + (down * across > 2)
        kinds = [rng.choice(["shape", "shape", "digit"]) for _ in range(things)]
        if rng.random() < 0.6:
            kinds[0] = "word"  # the widest things find room first
        actors = maker.scene(0, 0, 1, kinds)
        asked = tuple(_ask_picture(rng, actors, down * TILE, across * TILE))
        return Clip((maker.background(),), (0, 1), tuple(actors), asked)


@dataclass(frozen=True)
class Pair:
    """Two pictures of one tile, and what can be asked about both."""

    pictures: tuple[Clip, Clip]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Pairs:
    """The pairs of pictures of one split."""

    split: str

    def __post_init__(self) -> None:
        check_split(self.split)

    def __getitem__(self, seed: int) -> Pair:
        rng = random.Random(f"pairs-{self.split}-{seed}")
        maker = _Maker(self.split, rng)
        first, second = (self._picture(maker) for _ in range(2))
        return Pair((first, second), tuple(_ask_pair(first.actors, second.actors)))

    def _picture(self, maker: _Maker) -> Clip:
        kinds = [maker.rng.choice(["shape", "digit"]) for _ in range(maker.rng.randint(1, 3))]
        actors = maker.scene(0, 0, 1, kinds)
        return Clip((maker.background(),), (0, 1), tuple(actors), ())


# ----------------------------------------------------------------------------------------------------------- questions


def _ask_names(actors: list[Actor]) -> Iterator[Question]:
    """Digit, colour and shape questions that have exactly one right answer."""
    for kind in ("digit", "shape"):
        for actor in actors:
            if actor.kind == kind and not actor.later:
                others = [other for other in actors if other is not actor and other.kind == kind]
                if not any(actor.colour in other.colours for other in others):
                    wh = "What" if kind == "digit" else "Which"
                    yield Question(kind, f"{wh} {kind} is {actor.colour}?", actor.name)
    names = Counter(actor.name for actor in actors)
    for actor in actors:
        if actor.kind == "shape" and names[actor.name] == 1 and not actor.later:
            yield Question("colour", f"What colour is the {actor.name}?", actor.colour)


def _ask_existence(rng: random.Random, actors: list[Actor]) -> Iterator[Question]:
    """Half yes, half no; most of what is asked for in vain is there in another colour."""
    shapes = [actor for actor in actors if actor.kind == "shape" and not actor.later]
    if shapes:
        shape = rng.choice(shapes)
        name, colour, answer = shape.name, shape.colour, "yes"
        if rng.random() < 0.5:
            taken = {c for actor in actors if actor.name == name for c in actor.colours}
            absent = [c for c in COLOURS if c not in taken]
            elsewhere = [c for c in absent if any(c in actor.colours for actor in actors)]
            colour, answer = rng.choice(elsewhere if elsewhere and rng.random() < 0.7 else absent), "no"
        yield Question("exist", f"Is there {'an' if colour[0] in 'aeiou' else 'a'} {colour} {name}?", answer)


def _ask_clip(rng: random.Random, actors: list[Actor], cuts: tuple[int, ...]) -> Iterator[Question]:
    scenes_, length = len(cuts) - 1, cuts[-1]
    digits, shapes = ([a for a in actors if a.kind == kind] for kind in ("digit", "shape"))
    names = Counter(actor.name for actor in actors)
    yield Question("scenes", "How many scenes are there?", str(scenes_))
    if scenes_ > 1:
        for which, number in (("first", 0), ("last", scenes_ - 1)):
            for wh, kind, group in (("What", "digit", digits), ("Which", "shape", shapes)):
                inside = {actor.name for actor in group if actor.scene == number}
                if len(inside) == 1 and len({actor.name for actor in group}) > 1:
                    yield Question("inside", f"{wh} {kind} is in the {which} scene?", inside.pop())
    starts = Counter(digit.start for digit in digits)
    if len(digits) > 1:
        for which, time in (("first", min(starts)), ("last", max(starts))):
            if starts[time] == 1:
                (digit,) = (d for d in digits if d.start == time)
                yield Question("order", f"What digit came {which}?", digit.name)
    for shape in shapes:
        if names[shape.name] > 1:
            continue
        later = [digit.start for digit in digits if digit.start >= shape.end]
        if shape.end < length and later and starts[min(later)] == 1 and len(digits) > 1:
            (digit,) = (d for d in digits if d.start == min(later))
            yield Question("after", f"What digit came after the {shape.name} vanished?", digit.name)
        if shape.later:
            yield Question("turn", f"What colour did the {shape.name} turn?", shape.later)
        if shape.way:
            yield Question("move", f"Which way did the {shape.name} move?", shape.way)
    yield from _ask_names(actors)
    yield from _ask_existence(rng, actors)


def _ask_picture(rng: random.Random, actors: list[Actor], height: int, width: int) -> Iterator[Question]:
    yield from _ask_names(actors)
    yield from _ask_existence(rng, actors)
    for actor in actors:
        if actor.kind == "word":
            yield Question("word", "What word is written?", actor.name)
        if actor.kind == "shape" and sum(other.name == actor.name for other in actors) == 1:
            (left, top), (tall, wide) = actor.place, actor.opacity.shape
            x, y = (left + wide / 2) / width - 0.5, (top + tall / 2) / height - 0.5
            if min(abs(x), abs(y)) > 0.08:
                place = f"{'top' if y < 0 else 'bottom'}-{'left' if x < 0 else 'right'}"
                yield Question("where", f"Where is the {actor.name}?", place)


def _ask_pair(first: tuple[Actor, ...], second: tuple[Actor, ...]) -> Iterator[Question]:
    for which, mine, other in (("first", first, second), ("second", second, first)):
        for kind in ("shape", "digit"):
            names = [actor.name for actor in mine if actor.kind == kind]
            for name in names:
                if name not in {actor.name for actor in other}:
                    what = f"the {name}" if kind == "shape" else name
                    yield Question("which", f"Which image shows {what}?", which)
            if len(names) == 1:
                yield Question("image", f"Which {kind} is in the {which} image?", names[0])


# ----------------------------------------------------------------------------------------------------- evaluation sets


def questions(split: str = "test", limit: int | None = None) -> Iterator[Item]:
    """The evaluation set of a split: at most five questions each about 324 clips, 108 pictures and 108 pairs, mixed.

    `limit` questions are the first `limit` of the whole set. `vtc.eval.items.balanced` says how they are chosen.
    """
    return balanced(_media(split), QUESTIONS_PER_SCENE, limit)


def _media(split: str) -> Iterator[tuple[int, Clip | Pair, tuple[Medium, ...]]]:
    for index in range(EVAL_SCENES):
        seed = 1_000_000_000 + index  # those of training end far below
        turn = index % 5
        if turn == 1:
            picture = Pictures(split).make(seed, PICTURES[index // 5 % len(PICTURES)])
            yield index, picture, (Image.fromarray(picture.frames[0]),)
        elif turn == 3:
            pair = Pairs(split)[seed]
            yield index, pair, tuple(Image.fromarray(picture.frames[0]) for picture in pair.pictures)
        else:
            clip = Clips(split).make(seed, EVAL_FRAMES[index // 5 % len(EVAL_FRAMES)])
            yield index, clip, (clip.frames,)
