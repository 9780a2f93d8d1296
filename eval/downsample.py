"""The baseline `downsample`: pictures and frames scaled down, so that the model itself makes fewer visual tokens.

It works where the number of tokens depends on the size of a picture: at native resolution (the Qwens), and with crops
or tiles (LLaVA-NeXT, LLaVA-OneVision, InternVL) as far down as their processors go. Scaling keeps the aspect ratio. The
scale is searched for, not computed: the largest one whose tokens, as the processor makes them, stay within the budget;
or, where the processor makes no so few, the largest one with as few as it makes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from vtc.eval.items import Medium

STEPS = 256  # scales are tried in steps of this part of the full size
SMALLEST = 8  # of these steps: a thousandth of the pixels
LEAST = SMALLEST / STEPS


def budget(keep: int | float, tokens: int, media: int) -> int:
    """How many of `tokens` visual tokens a prompt with so many media is to have; `keep` as for a compressor."""
    return min(tokens, keep * media if isinstance(keep, int) else max(1, int(tokens * keep + 0.5)))


def search(count: Callable[[float], int], most: int) -> float:
    """The largest scale in (0, 1] at which `count` says at most `most`, or as few as at the smallest scale.

    `count` must not rise as the scale falls, as far as it matters: what is found always meets the bound.
    """
    most = max(most, count(LEAST))
    low, high = SMALLEST, STEPS + 1  # `low` meets the bound
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle / STEPS) <= most else (low, middle)
    return low / STEPS


def size(width: int, height: int, scale: float) -> tuple[int, int]:
    """Width and height of a scaled picture, in pixels."""
    return max(1, round(width * scale)), max(1, round(height * scale))


def shrink(medium: Medium, scale: float) -> Medium:
    """A picture or all frames of a clip at this scale; bicubic, as VTC-Bench does it."""
    if scale == 1.0:
        return medium
    if isinstance(medium, Image.Image):
        return medium.resize(size(*medium.size, scale), Image.Resampling.BICUBIC)
    return np.stack([np.asarray(shrink(Image.fromarray(frame), scale)) for frame in medium])
