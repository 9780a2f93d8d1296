"""Pictures of what survived: the right patches, in the right places of images of any shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtc.errors import VtcError
from vtc.picture import LARGEST, OUTLINE, PALETTE, draw, enlarge, side_by_side

RED = (200, 40, 40)


def plain(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), RED)


def middle(picture: Image.Image, row: int, column: int, rows: int, columns: int, box: Any = None) -> tuple[int, ...]:
    """The colour in the middle of a patch; `box` is the part of the picture that the grid covers, in shares."""
    left, top, right, bottom = box or (0, 0, 1, 1)
    x = (left + (right - left) * (column + 0.5) / columns) * picture.width
    y = (top + (bottom - top) * (row + 0.5) / rows) * picture.height
    return picture.getpixel((int(x), int(y)))  # type: ignore[return-value]


def test_kept_is_untouched_and_dropped_is_dark_and_grey() -> None:
    picture = draw(plain(64, 64), (4, 4), (0, 6, 15))
    for row in range(4):
        for column in range(4):
            colour = middle(picture, row, column, 4, 4)
            if 4 * row + column in (0, 6, 15):
                assert colour == RED
            else:
                assert sum(colour) < 0.5 * sum(RED)
                assert max(colour) - min(colour) < 0.2 * (max(RED) - min(RED))


def test_grid_may_have_a_frame_axis_of_one() -> None:
    assert draw(plain(40, 40), (1, 4, 4), (3,)).tobytes() == draw(plain(40, 40), (4, 4), (3,)).tobytes()


def test_several_frames_are_refused() -> None:
    with pytest.raises(VtcError, match="8"):
        draw(plain(40, 40), (8, 4, 4), (3,))


@pytest.mark.parametrize("kept", [(16,), (-1,)])
def test_token_outside_the_grid_is_refused(kept: tuple[int, ...]) -> None:
    with pytest.raises(VtcError, match="not on a grid of 4 x 4"):
        draw(plain(40, 40), (4, 4), kept)


@pytest.mark.parametrize(
    ("size", "box"),
    [((200, 100), (0.25, 0, 0.75, 1)), ((100, 200), (0, 0.25, 1, 0.75)), ((100, 100), (0, 0, 1, 1))],
)
def test_crop_shows_the_middle_and_greys_what_was_never_seen(size: tuple[int, int], box: Any) -> None:
    picture = draw(plain(*size), (4, 4), range(16), fit="crop")
    assert all(middle(picture, i, i, 4, 4, box) == RED for i in range(4))
    corner: Any = picture.getpixel((2, 2))
    if size[0] != size[1]:
        assert len(set(corner)) == 1, "outside the crop everything is grey"
        assert corner != RED


def test_resize_uses_the_whole_image() -> None:
    picture = draw(plain(200, 100), (4, 4), (0, 15), fit="resize")
    assert middle(picture, 0, 0, 4, 4) == middle(picture, 3, 3, 4, 4) == RED
    assert middle(picture, 0, 3, 4, 4) != RED


def test_grid_that_is_not_square() -> None:
    picture = draw(plain(120, 60), (2, 4), (5,), fit="crop")
    assert middle(picture, 1, 1, 2, 4) == RED
    assert middle(picture, 0, 1, 2, 4) != RED


def test_single_survivors_have_a_thin_white_line_between_them() -> None:
    picture = np.asarray(draw(plain(512, 512), (4, 4), (5, 6)))
    line = picture[192, 128:384]  # through both patches
    white = np.flatnonzero((line == OUTLINE).all(-1))
    assert white.tolist() == [0, 128, 255], "left edge, one line between, right edge"


def test_merged_tokens_share_a_coloured_outline() -> None:
    # Tokens 0, 1, 4 and 5 make survivor 0, which stands at 5; token 10 stands for itself; the rest is gone.
    sources = [-1] * 16
    for token in (0, 1, 4, 5):
        sources[token] = 0
    sources[10] = 1
    picture = draw(plain(512, 512), (4, 4), (5, 10), sources)
    pixels = np.asarray(picture)
    assert (
        tuple(pixels[0, 128])
        == tuple(pixels[255, 128])
        == tuple(pixels[128, 0])
        == tuple(pixels[128, 255])
        == PALETTE[0]
    )
    assert tuple(pixels[128, 64]) != PALETTE[0], "no line inside a group"
    clear, merged, dropped = (middle(picture, *divmod(token, 4), 4, 4) for token in (5, 0, 3))
    assert clear == RED
    assert sum(clear) > sum(merged) > sum(dropped)
    assert tuple(pixels[256, 320]) == OUTLINE


def test_sources_must_fit_the_grid() -> None:
    with pytest.raises(VtcError, match="3 tokens on a grid of 16"):
        draw(plain(40, 40), (4, 4), (1,), (0, 0, 0))


def test_image_is_not_changed() -> None:
    image = plain(64, 64)
    draw(image, (4, 4), (0,))
    assert image.getcolors() == [(64 * 64, RED)]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((128, 128), (512, 512)),
        ((128, 64), (512, 256)),
        ((500, 300), (500, 300)),
        ((5000, 2500), (LARGEST, LARGEST // 2)),
    ],
)
def test_small_images_grow_by_a_whole_factor_and_huge_ones_shrink(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert enlarge(plain(*size)).size == expected


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_any_mode_can_be_drawn(mode: str) -> None:
    assert draw(plain(32, 32).convert(mode), (4, 4), (0,)).mode == "RGB"


def test_sheet_holds_all_panels_and_wraps_captions() -> None:
    panels = [plain(200, 100), plain(120, 160)]
    short = side_by_side(panels, ["one", "two"])
    long = side_by_side(panels, ["one", "two " * 40])
    assert short.width == long.width > 320
    assert long.height > short.height > 160
    with pytest.raises(ValueError, match="zip"):
        side_by_side(panels, ["one"])
