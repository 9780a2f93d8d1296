"""Pictures of what survived: the right patches, in the right places of images and frames of any shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextImageProcessorPil, LlavaOnevisionImageProcessorPil, Qwen2VLImageProcessorPil

import vtc
from families import BOTH, FAMILIES, ONE_CLIP, ONE_IMAGE, TWO_IMAGES, AnyRes
from vtc import adapters
from vtc.errors import VtcError
from vtc.picture import LARGEST, OUTLINE, PALETTE, Fit, draw, enlarge, labels, save_gif, side_by_side, views
from vtc.report import Report
from vtc.visual import Layout, View

RED = (200, 40, 40)


def plain(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), RED)


def one(
    image: Image.Image,
    rows: int,
    columns: int,
    kept: Sequence[int],
    sources: Sequence[int] | None = None,
    fit: Fit = "crop",
) -> Image.Image:
    """The picture of an image of one view."""
    return views(image, Layout.frames(1, rows, columns), kept, sources, fit)[0]


def middle(picture: Image.Image, row: int, column: int, rows: int, columns: int, box: Any = None) -> tuple[int, ...]:
    """The colour in the middle of a patch; `box` is the part of the picture that the grid covers, in shares."""
    left, top, right, bottom = box or (0, 0, 1, 1)
    x = (left + (right - left) * (column + 0.5) / columns) * picture.width
    y = (top + (bottom - top) * (row + 0.5) / rows) * picture.height
    return picture.getpixel((int(x), int(y)))  # type: ignore[return-value]


def test_kept_is_untouched_and_dropped_is_dark_and_grey() -> None:
    picture = one(plain(64, 64), 4, 4, (0, 6, 15))
    for row in range(4):
        for column in range(4):
            colour = middle(picture, row, column, 4, 4)
            if 4 * row + column in (0, 6, 15):
                assert colour == RED
            else:
                assert sum(colour) < 0.5 * sum(RED)
                assert max(colour) - min(colour) < 0.2 * (max(RED) - min(RED))


@pytest.mark.parametrize("kept", [(16,), (-1,)])
def test_token_outside_the_grid_is_refused(kept: tuple[int, ...]) -> None:
    with pytest.raises(VtcError, match=f"no token {kept[0]}: this visual input has 16"):
        one(plain(40, 40), 4, 4, kept)


@pytest.mark.parametrize(
    ("size", "box"),
    [((200, 100), (0.25, 0, 0.75, 1)), ((100, 200), (0, 0.25, 1, 0.75)), ((100, 100), (0, 0, 1, 1))],
)
def test_crop_shows_the_middle_and_greys_what_was_never_seen(size: tuple[int, int], box: Any) -> None:
    picture = one(plain(*size), 4, 4, range(16), fit="crop")
    assert all(middle(picture, i, i, 4, 4, box) == RED for i in range(4))
    corner: Any = picture.getpixel((2, 2))
    if size[0] != size[1]:
        assert len(set(corner)) == 1, "outside the crop everything is grey"
        assert corner != RED


def test_resize_uses_the_whole_image() -> None:
    picture = one(plain(200, 100), 4, 4, (0, 15), fit="resize")
    assert middle(picture, 0, 0, 4, 4) == middle(picture, 3, 3, 4, 4) == RED
    assert middle(picture, 0, 3, 4, 4) != RED


@pytest.mark.parametrize("size", [(200, 100), (100, 200)])
def test_pad_has_tokens_beyond_the_image(size: tuple[int, int]) -> None:
    """Of 4 x 4 tokens on a square, the middle ones lie on the image; a quarter of the side is border on either end."""
    picture = one(plain(*size), 4, 4, (5,), fit="pad")
    rows, columns = (2, 4) if size[0] > size[1] else (4, 2)
    clear = {(0, 1)} if rows == 2 else {(1, 0)}
    for row in range(rows):
        for column in range(columns):
            assert (middle(picture, row, column, rows, columns) == RED) == ((row, column) in clear)


def test_grid_that_is_not_square() -> None:
    picture = one(plain(120, 60), 2, 4, (5,), fit="crop")
    assert middle(picture, 1, 1, 2, 4) == RED
    assert middle(picture, 0, 1, 2, 4) != RED


def test_single_survivors_have_a_thin_white_line_between_them() -> None:
    picture = np.asarray(one(plain(512, 512), 4, 4, (5, 6)))
    line = picture[192, 128:384]  # through both patches
    white = np.flatnonzero((line == OUTLINE).all(-1))
    assert white.tolist() == [0, 128, 255], "left edge, one line between, right edge"


def test_merged_tokens_share_a_coloured_outline() -> None:
    # Tokens 0, 1, 4 and 5 make survivor 0, which stands at 5; token 10 stands for itself; the rest is gone.
    sources = [-1] * 16
    for token in (0, 1, 4, 5):
        sources[token] = 0
    sources[10] = 1
    picture = one(plain(512, 512), 4, 4, (5, 10), sources)
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
    with pytest.raises(VtcError, match="3 tokens, but this visual input has 16"):
        one(plain(40, 40), 4, 4, (1,), (0, 0, 0))


def test_image_is_not_changed() -> None:
    image = plain(64, 64)
    one(image, 4, 4, (0,))
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
    assert one(plain(32, 32).convert(mode), 4, 4, (0,)).mode == "RGB"


def test_sheet_holds_all_panels_and_wraps_captions() -> None:
    panels = [plain(200, 100), plain(120, 160)]
    short = side_by_side(panels, ["one", "two"])
    long = side_by_side(panels, ["one", "two " * 40])
    assert short.width == long.width > 320
    assert long.height > short.height > 160
    with pytest.raises(ValueError, match="zip"):
        side_by_side(panels, ["one"])


# ------------------------------------------------------------------------------------------------ groups and colours


def test_groups_that_touch_have_different_colours() -> None:
    """64 blocks of 2 x 2 on 16 x 16 tokens: the colour of each outline differs from those of all eight neighbours."""
    rows = np.arange(256) // 16
    block = rows // 2 * 8 + np.arange(256) % 16 // 2
    anchors = [int(np.flatnonzero(block == number)[0]) for number in range(64)]
    order = np.argsort(np.argsort(anchors))
    pixels = np.asarray(one(plain(512, 512), 16, 16, sorted(anchors), order[block].tolist()))
    seen = pixels[0::64, 32::64].astype(int)  # in the middle of each block's upper edge
    assert {tuple(colour) for colour in seen.reshape(-1, 3).tolist()} <= set(PALETTE)
    for down, across in ((0, 1), (1, 0), (1, 1), (1, -1)):
        near = seen[: 8 - down, max(0, -across) : 8 - max(0, across)]
        far = seen[down:, max(0, across) : 8 + min(0, across)]
        assert (near != far).any(-1).all()


def test_a_group_over_frames_has_one_colour_in_all_of_them() -> None:
    """Two groups over four frames: one at the left that stands in frame 0, one at the right that stands in frame 2."""
    layout = Layout.frames(4, 4, 4, clip=True)
    sources = np.full((4, 4, 4), -1)
    sources[:, 1:3, 0], sources[:, 1:3, 3] = 0, 1
    kept = [4, 2 * 16 + 11]
    drawn = views([plain(512, 512)] * 4, layout, kept, sources.flatten().tolist())
    left, right = ({tuple(np.asarray(frame)[128, x]) for frame in drawn} for x in (64, 448))
    assert left == {PALETTE[0]} and right == {PALETTE[1]}
    clear = [[middle(frame, row, column, 4, 4) == RED for frame in drawn] for row, column in ((1, 0), (2, 3))]
    assert clear == [[True, False, False, False], [False, False, True, False]]


def test_nothing_kept_is_all_dark() -> None:
    dark = np.asarray(one(plain(64, 64), 4, 4, ()))
    assert dark.max() < 0.5 * max(RED)


def test_none_kept_is_the_picture_as_it_is() -> None:
    assert views(plain(64, 64), Layout.frames(1, 4, 4), None)[0].tobytes() == enlarge(plain(64, 64)).tobytes()


def test_heat_map_gets_lighter_with_the_rank() -> None:
    """In print without colours too; by rank, so that one huge score does not make all others alike."""
    scores = [1e9 if token == 11 else -3.0 + 0.01 * (7 * token % 16) for token in range(16)]
    (drawn,) = views(plain(512, 512), Layout.frames(1, 4, 4), (11,), scores=scores)
    grey = [drawn.convert("L").getpixel((128 * column + 64, 128 * row + 64)) for row in range(4) for column in range(4)]
    order = np.argsort(scores)
    assert (np.diff(np.array(grey)[order]) > 3).all()
    assert tuple(np.asarray(drawn)[256, 448]) == OUTLINE


def test_heat_map_leaves_out_what_has_no_score() -> None:
    scores = [float("nan") if token % 2 else float(token) for token in range(16)]
    heat, bare = one_with(scores), one_with(None)
    for token in range(16):
        same = middle(heat, *divmod(token, 4), 4, 4) == middle(bare, *divmod(token, 4), 4, 4)
        assert same == bool(token % 2)
    with pytest.raises(VtcError, match="3 scores, but this visual input has 16 tokens"):
        one_with([1.0, 2.0, 3.0])


def one_with(scores: Sequence[float] | None) -> Image.Image:
    return views(plain(64, 64), Layout.frames(1, 4, 4), (0, 1), scores=scores)[0]


# ----------------------------------------------------------------------------------- images in several resolutions


def spot(width: int, height: int, x: float, y: float, side: int = 3) -> Image.Image:
    """A dark picture with a bright spot at shares `x`, `y`."""
    pixels = np.full((height, width, 3), 60, np.uint8)
    left, top = int(x * width - side / 2), int(y * height - side / 2)
    pixels[max(0, top) : top + side, max(0, left) : left + side] = 255
    return Image.fromarray(pixels)


def holder(view: View, scores: torch.Tensor) -> int | None:
    """The token of a view in which the spot is; `None` if it lies across several."""
    bright = scores[view.places()] - scores[view.places()].min()
    second, first = bright.sort().values[-2:].tolist()
    return view.places()[int(bright.argmax())] if second < 0.5 * first else None


def seen_by(name: str, image: Image.Image) -> tuple[Layout, torch.Tensor]:
    """The layout and the brightness of every token, by the processor and the packing of a family."""
    family: Any = FAMILIES[name]
    adapter = adapters.find(family.model())
    if not isinstance(family, AnyRes):
        made = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=4096)(image, return_tensors="pt")
        rows = made["pixel_values"].mean(1)
    else:
        side = {"height": family.side, "width": family.side}
        options: dict[str, Any] = {"size": side, "image_grid_pinpoints": list(map(list, family.pinpoints))}
        if family.class_token:
            made = LlavaNextImageProcessorPil(**options, crop_size=side)(image, return_tensors="pt")
        else:
            made = LlavaOnevisionImageProcessorPil(**options)(image, return_tensors="pt")
        crops = made["pixel_values"][0].mean(1)  # (V, S, S)
        rows = crops.unflatten(1, (-1, 14)).unflatten(3, (-1, 14)).mean((2, 4)).flatten(1)  # (V, patches)
        if family.class_token:
            rows = torch.cat([torch.zeros(len(rows), 1), rows], dim=1)
    (layout,) = adapter.layouts("image", made)
    return layout, adapter.token_rows("image", rows, [layout])[0]


@pytest.mark.parametrize("name", ["llava-next", "llava-onevision", "qwen2vl"])
@pytest.mark.parametrize("size", [(180, 80), (200, 190), (60, 200), (144, 144), (300, 60), (97, 131)])
def test_tokens_are_drawn_where_the_model_looks(name: str, size: tuple[int, int]) -> None:
    """If only the token that sees a spot is kept, then only the surroundings of the spot are clear, in any shape."""
    found = 0
    for x, y in ((0.5, 0.45), (0.2, 0.4), (0.85, 0.3), (0.37, 0.66), (0.06, 0.5), (0.72, 0.58), (0.3, 0.1)):
        image = spot(*size, x, y)
        layout, scores = seen_by(name, image)
        original = np.asarray(enlarge(image), float)
        for number, view in enumerate(layout.views):
            token = holder(view, scores)
            if token is None:
                continue
            found += 1
            drawn = views(image, layout, (token,), fit="resize")[number]
            clear = (np.abs(np.asarray(drawn) - original) < 1).all(-1)
            # Where the canvas was scaled down, a token holds more of one patch than of the next.
            slack = (
                0.25 if name == "llava-onevision" else 0.1
            )  # of a token; the spot itself is two or three pixels wide
            for axis, (place, count) in enumerate(((y, view.rows), (x, view.columns))):
                lit = np.flatnonzero(clear.any(1 - axis)) / clear.shape[axis]
                assert lit.min() - slack / count <= place <= lit.max() + slack / count, (x, y)
            assert clear.mean() < 1.6 / (view.rows * view.columns), "one token of many"
    assert found >= 5


def test_what_is_cut_off_with_the_padding_is_grey() -> None:
    # 112 x 20 on a canvas of 112 x 56: of 8 x 4 patches one row above and one below are cut, 14 pixels each, so the
    # tokens cover 28 of 56, which is more than the image
    (all_covered,) = adapters.find(FAMILIES["llava-next"].model()).layouts(
        "image", {"image_sizes": torch.tensor([[20, 112]])}
    )
    assert all_covered.views[1].box == (0.25, 0.0, 0.75, 1.0)
    drawn = views(plain(112, 20), all_covered, range(all_covered.tokens))[1]
    assert all(middle(drawn, row, column, 2, 8) == RED for row in range(2) for column in range(8))
    # The same tokens on an image of 112 x 48: 10 of 48 pixels above, and 10 below, are beyond them.
    drawn = views(plain(112, 48), all_covered, range(all_covered.tokens))[1]
    column = np.asarray(drawn)[:, drawn.width // 16]
    grey = (column == column[:, :1]).all(-1)
    white = (column == OUTLINE).all(-1)
    assert (grey & ~white).mean() == pytest.approx(20 / 48, abs=0.01)
    assert (grey & ~white)[0] and (grey & ~white)[-1]


# ----------------------------------------------------------------------------------------- pictures that do not fit


CLIP, TILES, IMAGE = Layout.frames(3, 4, 4, clip=True), Layout.frames(3, 4, 4), Layout.frames(1, 4, 4)
TILES = Layout(TILES.tokens, TILES.views)
CROPS = Layout(16 + 8 * 9, (View(0, 4, 4), View(16, 8, 8, 1, (2, 2))))
WRONG: dict[str, tuple[Any, Layout, str]] = {
    "an image for a clip": (plain(9, 9), CLIP, "clip has 3 frames, but 1 pictures"),
    "too few frames": ([plain(9, 9)] * 2, CLIP, "clip has 3 frames, but 2 pictures"),
    "three pictures per frame": ([plain(9, 9)] * 9, CLIP, "clip has 3 frames, but 9 pictures"),
    "an image for tiles": (plain(9, 9), TILES, "3 tiles, and nothing tells where"),
    "frames for an image": ([plain(9, 9)] * 3, IMAGE, "one image, but 3 pictures"),
    "frames for crops": ([plain(9, 9)] * 2, CROPS, "one image, but 2 pictures"),
    "a path": ("photo.jpg", IMAGE, "not str"),
    "floats": (np.zeros((3, 9, 9, 3)), CLIP, "uint8 array .* not float64"),
    "channels first": (np.zeros((3, 3, 9, 9), np.uint8), CLIP, "height, width, 3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_pictures_that_do_not_fit_are_refused(name: str) -> None:
    image, layout, message = WRONG[name]
    with pytest.raises(VtcError, match=message):
        views(image, layout, (0,))


@pytest.mark.parametrize("form", ["list", "array", "tensor", "arrays"])
def test_frames_may_be_pictures_or_arrays(form: str) -> None:
    frames = np.stack([np.full((40, 60, 3), 50 * number, np.uint8) for number in range(1, 4)])
    given: dict[str, Callable[[], Any]] = {
        "list": lambda: [Image.fromarray(frame) for frame in frames],
        "array": lambda: frames,
        "tensor": lambda: torch.tensor(frames),
        "arrays": lambda: list(frames),
    }
    drawn = views(given[form](), CLIP, range(48))
    assert [middle(frame, 2, 2, 4, 4)[0] for frame in drawn] == [50, 100, 150]


def test_of_pairs_of_frames_the_first_is_drawn() -> None:
    frames = [plain(40, 40) if number % 2 == 0 else Image.new("RGB", (40, 40)) for number in range(6)]
    for given in (frames, frames[:5]):  # the processor repeats the last of an odd number
        assert all(middle(frame, 1, 1, 4, 4) == RED for frame in views(given, CLIP, range(48)))


def test_tiles_can_be_drawn_one_by_one() -> None:
    drawn = views([plain(40, 40)] * 3, TILES, (0, 16 + 5))
    clear = [[middle(tile, *divmod(token, 4), 4, 4) == RED for token in (0, 5)] for tile in drawn]
    assert clear == [[True, False], [False, True], [False, False]]
    assert labels(TILES) == ["tile 1", "tile 2", "tile 3"]


# ------------------------------------------------------------------------------------------------------ sheets


def test_contact_sheet_holds_all_frames_in_order() -> None:
    frames = [Image.new("RGB", (160, 90), (20 * number, 0, 0)) for number in range(1, 9)]
    layout = Layout.frames(8, 4, 4, clip=True)
    sheet = np.asarray(draw(frames, layout, None))
    order = [value for row in sheet[::4] for value in row[::4, 0][row[::4, 1] == 0].tolist()]
    found = [value for value in dict.fromkeys(order) if value in range(20, 161, 20)]
    assert found == list(range(20, 161, 20))
    assert 0.6 < sheet.shape[1] / sheet.shape[0] < 2.5


def test_frames_shrink_to_fit_but_their_tokens_stay_visible() -> None:
    many = draw([plain(640, 360)] * 30, Layout.frames(30, 4, 4, clip=True), (0,))
    assert max(many.size) <= 2 * LARGEST + 400
    fine = draw([plain(320, 180)] * 30, Layout.frames(30, 10, 100, clip=True), None)
    assert fine.width >= 5 * 320, "three pixels per token are too few to make any smaller"


def test_sheet_in_rows() -> None:
    panels = [plain(100, 80)] * 5
    row, grid = side_by_side(panels, ["a"] * 5), side_by_side(panels, ["a"] * 5, columns=3)
    assert grid.width < row.width < 2 * grid.width
    assert grid.height == 2 * row.height
    red = (np.asarray(grid) == RED).all(-1)
    assert red.sum() == 5 * 100 * 80


def test_gif_shows_the_frames_in_turn(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), (value, 0, 0)) for value in (40, 120, 200)]
    save_gif(frames, tmp_path / "kept.gif", seconds=0.25)
    with Image.open(tmp_path / "kept.gif") as file:
        assert file.n_frames == 3 and file.info["loop"] == 0  # type: ignore[attr-defined]
        for number, value in enumerate((40, 120, 200)):
            file.seek(number)
            assert file.info["duration"] == 250
            assert file.convert("RGB").getpixel((16, 16)) == (value, 0, 0)
    with pytest.raises(VtcError, match="does not end in .gif"):
        save_gif(frames, tmp_path / "kept.png")


# ------------------------------------------------------------------------------------------------------ reports


def report_of(name: str, specs: Any, row: tuple[str, ...]) -> Report:
    family = FAMILIES[name]
    model = family.model()
    with vtc.compress(model, specs) as session, torch.no_grad():
        model(**family.batch((row,)).inputs())
    assert session.last is not None
    return session.last


def is_clear(drawn: Image.Image, view: View, original: Image.Image) -> list[int]:
    """Which tokens of a view that covers the whole picture are untouched in their middles."""
    same = enlarge(original)
    return [
        row * view.columns + column
        for row in range(view.rows)
        for column in range(view.columns)
        if middle(drawn, row, column, view.rows, view.columns) == middle(same, row, column, view.rows, view.columns)
    ]


CLIPS = ("llava-next-video", "llava-onevision", "qwen2vl", "qwen25vl", "qwen3vl")


@pytest.mark.parametrize("name", CLIPS)
def test_kept_tokens_of_frames_are_clear(name: str) -> None:
    report = report_of(name, "uniform:keep=0.3", ONE_CLIP)
    (layout,), (kept,) = report.layouts, report.kept
    frames = [plain(64, 64)] * len(layout.views)
    drawn = report.views(frames, fit="resize")
    for frame, view in zip(drawn, layout.views, strict=True):
        here = [place - view.start for place in kept if view.start <= place < view.stop]
        assert is_clear(frame, view, frames[0]) == here


def test_inputs_are_drawn_by_their_numbers() -> None:
    """Images come first in a report, then clips, wherever they stand in the prompt."""
    report = report_of("qwen2vl", "uniform:keep=3", BOTH)
    assert report.modalities == ("image", "video")
    assert len(report.views(plain(64, 64), 0)) == 1
    assert len(report.views([plain(64, 64)] * len(report.layouts[1].views), 1)) == len(report.layouts[1].views) > 1
    with pytest.raises(VtcError, match="no number 2"):
        report.show(plain(64, 64), 2)


def test_a_report_at_a_prompt_is_one_line() -> None:
    """A clip has thousands of tokens, and a notebook shows what a cell ends with."""
    report = report_of("qwen2vl", ["uniform:keep=0.8", "fastv:keep=0.5,layer=2"], BOTH)
    assert repr(report) == f"<vtc.Report {str(report).splitlines()[0]}>"
    assert len(repr(report.stages[0])) < 80 and "uniform" in repr(report.stages[0])


def test_an_unknown_fit_is_refused() -> None:
    report = report_of("qwen2vl", "uniform:keep=3", ONE_IMAGE)
    with pytest.raises(VtcError, match="fit is 'squash'; use one of 'crop', 'resize', 'pad'"):
        report.show(plain(64, 64), fit="squash")  # type: ignore[arg-type]


def test_stages_are_drawn_one_by_one() -> None:
    report = report_of("qwen2vl", ["uniform:keep=0.8", "fastv:keep=0.5,layer=2"], ONE_IMAGE)
    view = report.layouts[0].views[0]
    image = plain(64, 64)
    assert len(report.stages) == 2 and len(report.stages[0].kept[0]) > len(report.kept[0])
    for stage, kept in ((0, report.stages[0].kept), (1, report.kept), (-1, report.kept), (None, report.kept)):
        (drawn,) = report.views(image, fit="resize", stage=stage)
        assert is_clear(drawn, view, image) == list(kept[0])
    for stage in (2, -3):
        with pytest.raises(VtcError, match=f"2 stages; there is no stage {stage}"):
            report.views(image, stage=stage)


def test_stages_know_what_was_merged_by_then() -> None:
    """All tokens merge at the input; those of dropped groups are gone after the cut inside."""
    report = report_of("qwen2vl", ["pool:keep=4", "fastv:keep=0.5,layer=2"], ONE_IMAGE)
    first, last = (stage.sources[0] for stage in report.stages)
    assert first is not None and set(first) == set(range(len(report.stages[0].kept[0])))
    assert last == report.sources[0] and last is not None and -1 in last
    assert sum(source >= 0 for source in last) > len(report.kept[0])


def test_captions_say_budget_and_flops() -> None:
    report = report_of("qwen2vl", "uniform:keep=0.5", ONE_IMAGE)
    ratio = report.prefill_flops / report.prefill_flops_full
    assert report.caption() == f"uniform:keep=0.5\n8 of 16 tokens, {ratio:.2f}x prefill FLOPs"


def test_captions_say_where_a_stage_acts() -> None:
    specs = ["uniform:keep=0.5", "fastv:keep=0.5,layer=2"]
    report = report_of("qwen2vl", specs, ONE_IMAGE)
    ratio = report.prefill_flops / report.prefill_flops_full
    assert report.caption(stage=0) == f"{specs[0]}\n8 of 16 tokens at the input"
    assert report.caption(stage=1) == f"{report.stages[1].spec}\n4 of 16 tokens from decoder layer 2 on"
    assert report.caption() == f"{report.spec}\n4 of 16 tokens from decoder layer 2 on, {ratio:.2f}x prefill FLOPs"


def test_captions_count_separators() -> None:
    """They are tokens that show nothing: one behind each row of crops, one behind a clip."""
    report = report_of("llava-next", "uniform:keep=1.0", ONE_IMAGE)
    rows = report.layouts[0].views[1].rows
    assert f"{report.tokens_in} of {report.tokens_in} tokens (separators: {rows} of {rows})" in report.caption()
    report = report_of("llava-onevision", "uniform:keep=0.3", ONE_CLIP)
    last = report.tokens_in - 1
    assert f"(separators: {int(last in report.kept[0])} of 1)" in report.caption()
    assert "separators" not in report_of("qwen2vl", "uniform:keep=3", ONE_CLIP).caption()


def test_show_puts_all_views_and_the_caption_on_a_sheet() -> None:
    report = report_of("llava-next", "uniform:keep=0.5", ONE_IMAGE)
    image = plain(180, 80)
    bare = report.show(image, caption="")
    assert bare.tobytes() == draw(image, report.layouts[0], report.kept[0], None, report.fit).tobytes()
    full, other = report.show(image), report.show(image, caption="one line")
    assert full.width == other.width > bare.width and full.height > other.height > bare.height
    assert (np.asarray(full)[8 : 8 + bare.height, 8 : 8 + bare.width] == np.asarray(bare)).all()


def test_animate_has_a_frame_per_view(tmp_path: Path) -> None:
    report = report_of("llava-onevision", "divprune:keep=0.3", ONE_CLIP)
    frames = [plain(64, 64)] * len(report.layouts[0].views)
    report.animate(frames, tmp_path / "kept.gif", fit="resize", seconds=0.1)
    with Image.open(tmp_path / "kept.gif") as file:
        assert file.n_frames == len(frames)  # type: ignore[attr-defined]


def test_tiles_of_one_and_of_several() -> None:
    report = report_of("internvl", "uniform:keep=0.5", TWO_IMAGES)
    assert [len(layout.views) for layout in report.layouts] == [1, 3]
    image = plain(64, 64)
    assert is_clear(report.views(image, 0)[0], report.layouts[0].views[0], image) == list(report.kept[0])
    with pytest.raises(VtcError, match="3 tiles"):
        report.views(image, 1)
