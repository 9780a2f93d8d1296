"""Pictures of what survived: dropped patches dimmed, survivors clear, merged groups outlined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vtc.errors import VtcError

# Okabe and Ito's colours, which colour-blind readers can tell apart, without black.
PALETTE = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (213, 94, 0),
    (204, 121, 167),
    (0, 114, 178),
)
OUTLINE = (255, 255, 255)
UNSEEN = 128  # grey of what the encoder's crop cuts off
SMALLEST, LARGEST = 512, 1280  # of a picture's longer side, in pixels
MARGIN = 8

Fit = Literal["crop", "resize"]


def draw(
    image: Image.Image,
    grid: Sequence[int],
    kept: Sequence[int],
    sources: Sequence[int] | None = None,
    fit: Fit = "crop",
) -> Image.Image:
    """Draw which tokens of an image survived.

    Args:
        image: the picture that was given to the processor.
        grid: `(rows, columns)` of the tokens, or `(1, rows, columns)`.
        kept: indices of the survivors, in raster order.
        sources: for merging, the survivor (0..K-1) that each token went to, -1 for dropped; see `Selection.sources`.
        fit: how the processor brings the image to the encoder: `"crop"` takes the middle of the image, and what lies
            outside is greyed as never seen; `"resize"` squashes the whole image.
    """
    rows, columns = _plane(grid)
    for index in kept:
        if not 0 <= index < rows * columns:
            raise VtcError(f"token {index} is not on a grid of {rows} x {columns}")
    picture = enlarge(image.convert("RGB"))
    left, top, right, bottom = _seen(picture.size, rows, columns, fit)
    x = [round(left + (right - left) * column / columns) for column in range(columns + 1)]
    y = [round(top + (bottom - top) * row / rows) for row in range(rows + 1)]

    pixels = np.asarray(picture, np.float32)  # (h, w, 3)
    grey = pixels.mean(-1, keepdims=True)
    shown = 0.5 * UNSEEN + 0.25 * grey.repeat(3, -1)
    inside = (slice(y[0], y[-1]), slice(x[0], x[-1]))
    shown[inside] = 0.3 * (0.25 * pixels + 0.75 * grey)[inside]
    group: np.ndarray = _groups(rows * columns, kept, sources).reshape(rows, columns)
    survivors = set(kept)
    for row, column in np.argwhere(group >= 0):
        cell = (slice(y[row], y[row + 1]), slice(x[column], x[column + 1]))
        # A token that went into another one is paler than the one that stands for both.
        share = 1.0 if row * columns + column in survivors else 0.55
        shown[cell] = share * pixels[cell] + (1 - share) * shown[cell]
    result = Image.fromarray(shown.clip(0, 255).astype(np.uint8))
    _outline(result, group, x, y)
    return result


def enlarge(image: Image.Image) -> Image.Image:
    """A small picture a whole number of times larger, a huge one smaller; both sides by the same factor."""
    longest = max(image.size)
    if longest > LARGEST:
        scale = LARGEST / longest
        return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    factor = max(1, round(SMALLEST / longest))
    return image.resize([side * factor for side in image.size], Image.Resampling.BICUBIC) if factor > 1 else image


def side_by_side(panels: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Pictures in a row, each above its caption (lines are kept, long ones wrapped)."""
    size = max(13, round(min(panel.width for panel in panels) / 30))
    font = ImageFont.load_default(size)
    texts = [_wrap(caption, font, panel.width) for panel, caption in zip(panels, captions, strict=True)]
    line = round(1.4 * size)
    tall = max(panel.height for panel in panels)
    width = sum(panel.width for panel in panels) + MARGIN * (len(panels) + 1)
    height = tall + line * max(len(text) for text in texts) + 3 * MARGIN
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    left = MARGIN
    for panel, text in zip(panels, texts, strict=True):
        sheet.paste(panel, (left, MARGIN))
        for number, words in enumerate(text):
            pen.text((left, tall + 2 * MARGIN + number * line), words, fill=(0, 0, 0), font=font)
        left += panel.width + MARGIN
    return sheet


def _plane(grid: Sequence[int]) -> tuple[int, int]:
    *frames, rows, columns = grid
    if any(count != 1 for count in frames):
        raise VtcError(f"a picture shows one frame, but this visual input has {frames[0]}")
    return rows, columns


def _seen(size: tuple[int, int], rows: int, columns: int, fit: Fit) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom) of the image that the encoder saw."""
    width, height = size
    if fit == "resize":
        return 0.0, 0.0, float(width), float(height)
    side = min(width / columns, height / rows)  # of a patch
    left, top = (width - side * columns) / 2, (height - side * rows) / 2
    return left, top, left + side * columns, top + side * rows


def _groups(tokens: int, kept: Sequence[int], sources: Sequence[int] | None) -> np.ndarray:
    """`(tokens,)`: the survivor that each token went to, -1 for dropped."""
    group = np.full(tokens, -1) if sources is None else np.array(sources)
    if group.shape != (tokens,):
        raise VtcError(f"sources names {group.size} tokens on a grid of {tokens}")
    group[list(kept)] = np.arange(len(kept))
    return group


def _outline(picture: Image.Image, group: np.ndarray, x: Sequence[int], y: Sequence[int]) -> None:
    """A line wherever a group ends: white around single survivors, a colour around merged groups."""
    pen = ImageDraw.Draw(picture)
    rows, columns = group.shape
    padded = np.pad(group, 1, constant_values=-1)
    sizes = np.bincount(group[group >= 0], minlength=1)
    thick = max(1, (x[-1] - x[0]) // columns // 12)
    for row in range(rows):
        for column in range(columns):
            mine = group[row, column]
            if mine < 0:
                continue
            alone = sizes[mine] == 1
            colour, inner = (OUTLINE, 0) if alone else (PALETTE[mine % len(PALETTE)], thick - 1)
            left, top, right, bottom = x[column], y[row], x[column + 1] - 1, y[row + 1] - 1
            edges = {
                (0, 1): (left, top, right, top + inner),
                (1, 0): (left, top, left + inner, bottom),
                (2, 1): (left, bottom - inner, right, bottom),
                (1, 2): (right - inner, top, right, bottom),
            }
            for (down, across), edge in edges.items():
                other = padded[row + down, column + across]
                # Of two neighbours that survive alone, the right or the lower one draws the line between them.
                shared = alone and 2 in (down, across) and other >= 0 and sizes[other] == 1
                if other != mine and not shared:
                    pen.rectangle(edge, fill=colour)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels; a word that is wider stands alone."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    return lines
