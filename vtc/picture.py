"""Pictures of what survived: dropped patches dimmed, survivors clear, merged groups outlined."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vtc.errors import VtcError
from vtc.visual import Layout, View

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
EDGE = (0, 0, 0)
HEAT = ((0, 34, 78), (66, 78, 108), (124, 123, 120), (187, 172, 105), (254, 232, 56))  # from low to high: cividis
UNSEEN = 128  # grey of what the encoder never sees
MERGED = 0.55  # how much is left of the colours of a token that went into another one
SMALLEST, LARGEST = 512, 1280  # of a picture's longer side, in pixels
CELL = 7  # of the smallest token of a contact sheet, in pixels
SHAPE = 4 / 3  # of a contact sheet, width by height
MARGIN = 8

Fit = Literal["crop", "resize", "pad"]


def views(
    images: Any,
    layout: Layout,
    kept: Sequence[int] | None,
    sources: Sequence[int] | None = None,
    fit: Fit = "crop",
    scores: Sequence[float] | None = None,
    largest: int = LARGEST,
) -> list[Image.Image]:
    """Draw which tokens of a visual input survived: one picture per view, so per frame, or thumbnail and crops.

    Args:
        images: the picture that was given to the processor; for a clip its frames, in order. Each is a PIL image or a
            uint8 array (height, width, 3); frames may be one array (frames, height, width, 3). Twice as many frames as
            the layout has are taken for pairs, of which the first is drawn.
        layout: how the uncompressed tokens lie.
        kept: ascending indices of the survivors; `None` draws the pictures as they are.
        sources: for merging, the survivor (0..K-1) that each token went to, -1 for dropped; see `Selection.sources`.
            Groups that touch have outlines of different colours; a group has the same colour in all views.
        fit: how the processor brings a picture to the encoder's shape: `"crop"` takes its middle, and what lies outside
            is greyed as never seen; `"resize"` squashes it; `"pad"` adds borders until it has the shape. An image with
            crops does not ask: its thumbnail is squashed, and its crops are put on their canvas without distortion.
        scores: one per token, NaN where there is none. The picture is then a heat map: the higher a score ranks, the
            lighter its token, from blue to yellow. Survivors are outlined as ever.
        largest: of a picture's longer side, in pixels; smaller pictures grow by a whole number.
    """
    if fit not in get_args(Fit):
        raise VtcError(f"fit is {fit!r}; use one of {', '.join(map(repr, get_args(Fit)))}")
    pictures = [enlarge(picture.convert("RGB"), largest) for picture in _pictures(images, layout)]
    if kept is None:
        return pictures
    group = _groups(layout.tokens, kept, sources)
    colours = _colours(group, layout)
    share = np.where(group >= 0, MERGED, 0.0)
    share[list(kept)] = 1.0
    rank = None if scores is None else _ranks(layout, scores)
    found = []
    canvas = _canvas(layout)
    for picture, view in zip(pictures, layout.views, strict=True):
        box = _on_canvas(picture.size, view) if view is canvas else None
        left, top, right, bottom = box or _seen(picture.size, view, "resize" if canvas else fit)
        x = [round(left + (right - left) * column / view.columns) for column in range(view.columns + 1)]
        y = [round(top + (bottom - top) * row / view.rows) for row in range(view.rows + 1)]
        places = np.array(view.places()).reshape(view.rows, view.columns)
        drawn = _paint(picture, share[places], None if rank is None else rank[places], x, y)
        _outline(drawn, group[places], colours, x, y, edged=rank is not None)
        found.append(drawn)
    return found


def draw(
    images: Any,
    layout: Layout,
    kept: Sequence[int] | None,
    sources: Sequence[int] | None = None,
    fit: Fit = "crop",
    scores: Sequence[float] | None = None,
) -> Image.Image:
    """The views of a visual input on one sheet; the arguments are those of `views`."""
    count = len(layout.views)
    if count == 1:
        return views(images, layout, kept, sources, fit, scores)[0]
    width, height = _pictures(images, layout)[0].size
    columns = _columns(count, width / height)
    finest = max(max(view.rows, view.columns) for view in layout.views)
    largest = max(2 * LARGEST // max(2, columns), CELL * finest)
    panels = views(images, layout, kept, sources, fit, scores, largest)
    return side_by_side(panels, labels(layout), columns, border=0)


def labels(layout: Layout) -> list[str]:
    """What each view is."""
    if _canvas(layout):
        return ["thumbnail", "crops"]
    return [f"{'frame' if layout.clip else 'tile'} {number + 1}" for number in range(len(layout.views))]


def enlarge(image: Image.Image, largest: int = LARGEST) -> Image.Image:
    """A small picture a whole number of times larger, a huge one smaller; both sides by the same factor."""
    longest = max(image.size)
    if longest > largest:
        scale = largest / longest
        return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    factor = max(1, min(round(SMALLEST / longest), largest // longest))
    return image.resize([side * factor for side in image.size], Image.Resampling.BICUBIC) if factor > 1 else image


def side_by_side(
    panels: Sequence[Image.Image], captions: Sequence[str], columns: int | None = None, border: int = MARGIN
) -> Image.Image:
    """Pictures in a row, or in rows of `columns`, each above its caption (lines are kept, long ones wrapped)."""
    narrowest = min(panel.width for panel in panels)
    size, gap = max(13, round(0.75 * math.sqrt(narrowest))), max(MARGIN, narrowest // 40)
    font = ImageFont.load_default(size)
    texts = [_wrap(caption, font, panel.width) for panel, caption in zip(panels, captions, strict=True)]
    line, columns = round(1.4 * size), columns or len(panels)
    rows = [range(start, min(start + columns, len(panels))) for start in range(0, len(panels), columns)]
    tall = [max(panels[number].height for number in row) for row in rows]
    text = [line * max(len(texts[number]) for number in row) for row in rows]
    wide = [max(panel.width for panel in panels[column::columns]) for column in range(columns)]
    width = sum(wide) + gap * (columns - 1) + 2 * border
    height = sum(tall) + sum(text) + MARGIN * len(rows) + 2 * MARGIN * (len(rows) - 1) + 2 * border
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    top = border
    for row, tallest, below in zip(rows, tall, text, strict=True):
        left = border
        for number, widest in zip(row, wide, strict=False):
            sheet.paste(panels[number], (left, top))
            for place, words in enumerate(texts[number]):
                pen.text((left, top + tallest + MARGIN + place * line), words, fill=(0, 0, 0), font=font)
            left += widest + gap
        top += tallest + below + 3 * MARGIN
    return sheet


def save_gif(pictures: Sequence[Image.Image], path: str | Path, seconds: float = 0.5) -> None:
    """Pictures of one size one after the other, `seconds` each, over and over."""
    if Path(path).suffix.lower() != ".gif":
        raise VtcError(f"{path} does not end in .gif, the only format for moving pictures here")
    # Without dithering, which would speckle the outlines.
    flat = [picture.quantize(256, dither=Image.Dither.NONE) for picture in pictures]
    flat[0].save(path, save_all=True, append_images=flat[1:], duration=round(1000 * seconds), loop=0)


# -------------------------------------------------------------------------------------------- pictures and views


def _pictures(images: Any, layout: Layout) -> list[Image.Image]:
    """One picture per view."""
    given, count = _listed(images), len(layout.views)
    if _canvas(layout) and len(given) == 1:
        return given * count
    if not _canvas(layout) and len(given) == count:
        return given
    if layout.clip and len(given) in (2 * count - 1, 2 * count):
        return given[::2]
    if layout.clip:
        raise VtcError(f"this clip has {count} frames, but {len(given)} pictures were given: give its frames, in order")
    if _canvas(layout) or count == 1:
        raise VtcError(f"this visual input is one image, but {len(given)} pictures were given")
    raise VtcError(
        f"this image went to the model as {count} tiles, and nothing tells where on the image they lie: give the tiles "
        f"themselves, a list of {count} pictures"
    )


def _listed(images: Any) -> list[Image.Image]:
    if isinstance(images, Image.Image) or getattr(images, "ndim", 0) == 3:
        images = [images]
    elif not (isinstance(images, Sequence) and not isinstance(images, str)) and not hasattr(images, "ndim"):
        raise VtcError(f"give a PIL image, or the frames of a clip, not {type(images).__name__}")
    return [image if isinstance(image, Image.Image) else _from_array(np.asarray(image)) for image in images]


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise VtcError(f"a picture is a PIL image or a uint8 array (height, width, 3), not {array.dtype} {array.shape}")
    return Image.fromarray(array)


def _canvas(layout: Layout) -> View | None:
    """The view of all crops, if this is an image in several resolutions."""
    last = layout.views[-1]
    is_canvas = len(layout.views) == 2 and not layout.clip and (last.crops != (1, 1) or last.separators > 0)
    return last if is_canvas else None


def _seen(size: tuple[int, int], view: View, fit: Fit) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom), in pixels of the picture, that the tokens cover."""
    width, height = size
    if fit == "resize":
        return 0.0, 0.0, float(width), float(height)
    inside, outside = sorted((width / view.columns, height / view.rows))
    side = inside if fit == "crop" else outside  # of a token
    left, top = (width - side * view.columns) / 2, (height - side * view.rows) / 2
    return left, top, left + side * view.columns, top + side * view.rows


def _on_canvas(size: tuple[int, int], view: View) -> tuple[float, float, float, float]:
    """The same for crops: the picture lies in the middle of their canvas, as large as fits, and crops are square."""
    width, height = size
    down, across = view.crops
    side = max(width / across, height / down)  # of a crop
    left, top = (width - side * across) / 2, (height - side * down) / 2
    box = view.box
    return (
        left + box[1] * side * across,
        top + box[0] * side * down,
        left + box[3] * side * across,
        top + box[2] * side * down,
    )


def _columns(count: int, aspect: float) -> int:
    """How many panels of a shape go into a row, for a sheet of nearly the right shape with few gaps."""

    def badness(columns: int) -> tuple[float, int]:
        rows = math.ceil(count / columns)
        return abs(math.log(aspect * columns / rows / SHAPE)) + (rows * columns - count) / count, columns

    return min(range(1, count + 1), key=badness)


# --------------------------------------------------------------------------------------------------- drawing


def _paint(
    picture: Image.Image, share: np.ndarray, rank: np.ndarray | None, x: Sequence[int], y: Sequence[int]
) -> Image.Image:
    """Darken what was dropped, grey what lies outside, and colour what has a rank.

    Args:
        picture: of any size.
        share: `(rows, columns)`, how much is left of each token.
        rank: `(rows, columns)` from 0 to 1, NaN for none.
        x, y: the borders of tokens in pixels.
    """
    pixels = np.asarray(picture, np.float32)  # (h, w, 3)
    grey = pixels.mean(-1, keepdims=True)
    row = np.searchsorted(y, np.arange(picture.height), side="right") - 1
    column = np.searchsorted(x, np.arange(picture.width), side="right") - 1
    seen = ((row >= 0) & (row < len(y) - 1))[:, None] & ((column >= 0) & (column < len(x) - 1))  # (h, w)
    token = row.clip(0, len(y) - 2)[:, None], column.clip(0, len(x) - 2)  # of every pixel
    left = share[token][..., None]  # (h, w, 1)
    shown = left * pixels + (1 - left) * 0.3 * (0.25 * pixels + 0.75 * grey)
    if rank is not None:
        height = rank[token]
        steps = np.linspace(0, 1, len(HEAT))
        heat = np.stack([np.interp(height, steps, channel) for channel in zip(*HEAT, strict=True)], -1)
        shown = np.where(np.isnan(height)[..., None], shown, heat * (0.6 + 0.4 * grey / 255))
    shown = np.where(seen[..., None], shown, 0.5 * UNSEEN + 0.25 * grey)
    return Image.fromarray(shown.clip(0, 255).astype(np.uint8))


def _ranks(layout: Layout, scores: Sequence[float]) -> np.ndarray:
    """`(tokens,)`: 0 for the lowest score in any view, 1 for the highest, NaN for none."""
    values = np.asarray(scores, float)
    if values.shape != (layout.tokens,):
        raise VtcError(f"there are {values.size} scores, but this visual input has {layout.tokens} tokens")
    places = [place for view in layout.views for place in view.places() if not np.isnan(values[place])]
    rank = np.full(layout.tokens, np.nan)
    rank[places] = values[places].argsort(kind="stable").argsort() / max(1, len(places) - 1)
    return rank


def _groups(tokens: int, kept: Sequence[int], sources: Sequence[int] | None) -> np.ndarray:
    """`(tokens,)`: the survivor that each token went to, -1 for dropped."""
    for index in kept:
        if not 0 <= index < tokens:
            raise VtcError(f"there is no token {index}: this visual input has {tokens}")
    group = np.full(tokens, -1) if sources is None else np.array(sources)
    if group.shape != (tokens,):
        raise VtcError(f"sources names {group.size} tokens, but this visual input has {tokens}")
    group[list(kept)] = np.arange(len(kept))
    return group


def _colours(group: np.ndarray, layout: Layout) -> dict[int, tuple[int, int, int]]:
    """The colour of every merged group, so that groups that touch in a view differ, as far as the palette allows."""
    numbers, sizes = np.unique(group[group >= 0], return_counts=True)
    merged = numbers[sizes > 1].tolist()
    touching: dict[int, set[int]] = defaultdict(set)
    for view in layout.views:
        plane = group[np.array(view.places())].reshape(view.rows, view.columns)
        beside = (plane[:, :-1], plane[:, 1:]), (plane[:-1], plane[1:])
        corners = (plane[:-1, :-1], plane[1:, 1:]), (plane[:-1, 1:], plane[1:, :-1])
        for ones, others in (*beside, *corners):
            for one, other in set(zip(ones.flatten().tolist(), others.flatten().tolist(), strict=True)):
                touching[one].add(other)
                touching[other].add(one)
    chosen: dict[int, int] = {}
    for number, mine in enumerate(merged):
        taken = {chosen.get(other) for other in touching[mine]}
        order = [(number + step) % len(PALETTE) for step in range(len(PALETTE))]
        chosen[mine] = next((colour for colour in order if colour not in taken), order[0])
    return {mine: PALETTE[colour] for mine, colour in chosen.items()}


def _outline(
    picture: Image.Image,
    group: np.ndarray,
    colours: dict[int, tuple[int, int, int]],
    x: Sequence[int],
    y: Sequence[int],
    edged: bool = False,
) -> None:
    """A line wherever a group ends: white around single survivors, a colour around merged groups.

    The colours have a dark edge, and if `edged` white has one too.
    """
    pen = ImageDraw.Draw(picture)
    rows, columns = group.shape
    side = min((x[-1] - x[0]) // columns, (y[-1] - y[0]) // rows)
    thick = max(1, min(side // 12, 6))
    padded = np.pad(group, 1, constant_values=-1)
    # Parts of tokens may lie outside the picture.
    x = [min(max(edge, 0), picture.width) for edge in x]
    y = [min(max(edge, 0), picture.height) for edge in y]
    for row, column in np.argwhere(group >= 0).tolist():
        mine = group[row, column]
        left, top, right, bottom = x[column], y[row], x[column + 1] - 1, y[row + 1] - 1
        if right < left or bottom < top:
            continue
        alone = mine not in colours
        lines = [(1, OUTLINE)] if alone else [(thick, colours[mine])]
        if (
            edged or not alone
        ) and side > 12:  # in print without colours, many a colour is the grey of what it surrounds
            lines.insert(0, (lines[0][0] + 1, EDGE))
        for width, colour in lines:
            edges = {
                (0, 1): (left, top, right, min(top + width - 1, bottom)),
                (1, 0): (left, top, min(left + width - 1, right), bottom),
                (2, 1): (left, max(bottom - width + 1, top), right, bottom),
                (1, 2): (max(right - width + 1, left), top, right, bottom),
            }
            for (down, across), edge in edges.items():
                other = padded[row + down, column + across]
                # Of two neighbours that survive alone, the right or the lower one draws the line between them.
                shared = alone and 2 in (down, across) and other >= 0 and other not in colours
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
