"""What procedural pictures are made of: shapes, handwritten digits, words, textures and photographs.

The splits share the vocabulary (shapes, colours, words, typefaces) and nothing else: the images of digits, the
background textures and the photographs of `train`, `val` and `test` are disjoint.

The real content (digits, rendered words, photographs) comes from `assets/scenes.npz`; `assets/LICENSES.md` names its
sources and `training/make_assets.py` in the repository builds it.
"""

from __future__ import annotations

import functools
import io
import math
import random
from collections.abc import Sequence
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
SPLITS = ("train", "val", "test")

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom exclusive

SHAPE_SIZES = range(15, 30)  # pixels
DIGIT_SIZES = range(17, 30)
WORD_SIZES = range(13, 20)  # nominal height of the typeface
TYPEFACES = 3
PHOTO_SHARE = 0.2  # of the backgrounds
TEXTURES = {"train": 400, "val": 80, "test": 80}
DIGIT_SLICES = {"train": slice(0, 1300), "val": slice(1300, 1450), "test": slice(1450, None)}


@functools.cache
def _assets() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "assets" / "scenes.npz") as stored:
        return dict(stored)


@functools.cache
def digits(split: str) -> tuple[tuple[np.ndarray, ...], ...]:
    """Per class 0-9, the images (8, 8) of a split, float32 in [0, 1]."""
    images, labels = (_assets()[name][DIGIT_SLICES[split]] for name in ("digits", "digit_labels"))
    return tuple(tuple(images[labels == k].astype(np.float32) / 16) for k in range(10))


@functools.cache
def word_mask(word: int, typeface: int, size: int) -> np.ndarray:
    """Opacity (h, w) of a rendered word, float32 in [0, 1]; the three arguments are indices."""
    assets = _assets()
    shapes = assets["word_shapes"].astype(np.int64)  # (words, typefaces, sizes, 2)
    ends = shapes.prod(-1).ravel().cumsum().reshape(shapes.shape[:3])
    height, width = shapes[word, typeface, size]
    end = ends[word, typeface, size]
    return assets["word_pixels"][end - height * width : end].reshape(height, width).astype(np.float32) / 255


@functools.cache
def photos(split: str) -> tuple[np.ndarray, ...]:
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
def texture(split: str, index: int, side: int) -> np.ndarray:
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
def shape_mask(name: str, size: int) -> np.ndarray:
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


def check_split(split: str) -> None:
    """Refuse what is no split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; one of {', '.join(SPLITS)}")


def opacity(
    rng: random.Random,
    split: str,
    kind: str,
    name: str,
    shape_sizes: Sequence[int] = SHAPE_SIZES,
    digit_sizes: Sequence[int] = DIGIT_SIZES,
    word_sizes: int = len(WORD_SIZES),
) -> np.ndarray:
    """The form of a thing, (h, w) float32 in [0, 1], of a random size and, if it is written, in a random hand.

    `shape_sizes` and `digit_sizes` are pixels to draw from; of the sizes of words the smallest `word_sizes` are used.
    """
    if kind == "shape":
        return shape_mask(name, rng.choice(shape_sizes))
    if kind == "word":
        return word_mask(WORDS.index(name), rng.randrange(TYPEFACES), rng.randrange(word_sizes))
    size = rng.choice(digit_sizes)
    digit = Image.fromarray(rng.choice(digits(split)[int(name)])).resize((size, size), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(digit) * 1.25 - 0.1, 0, 1)


def source(rng: random.Random, split: str, side: int) -> np.ndarray:
    """What a background is cut from: a photograph, or a texture with that side; (h, w, 3)."""
    if rng.random() < PHOTO_SHARE:
        return rng.choice(photos(split))
    return texture(split, rng.randrange(TEXTURES[split]), side)


def cut(rng: random.Random, source: np.ndarray, height: int, width: int) -> np.ndarray:
    """A random part of a background (h, w, 3), perhaps mirrored: (height, width, 3)."""
    top, left = rng.randint(0, source.shape[0] - height), rng.randint(0, source.shape[1] - width)
    part = source[top : top + height, left : left + width]
    if rng.random() < 0.5:
        part = part[:, ::-1]
    return part[::-1] if rng.random() < 0.5 else part


def shaded(rng: random.Random, background: np.ndarray) -> np.ndarray:
    """A background, a little brighter or darker, with more or less contrast; float32."""
    return background.astype(np.float32) * rng.uniform(0.8, 1.15) + rng.uniform(-15, 15)


def apart(a: Box, b: Box, gap: int) -> bool:
    """Whether there are at least `gap` pixels between two boxes."""
    return a[2] + gap <= b[0] or b[2] + gap <= a[0] or a[3] + gap <= b[1] or b[3] + gap <= a[1]
