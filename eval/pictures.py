"""Pictures and clips from files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from vtc.errors import VtcError
from vtc.eval.lmms.clips import Clip, read, spread

VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
MOVING = {"GIF", "PNG", "WEBP"}  # other pictures that hold several mean previews and the like


def open_image(path: Path) -> Image.Image:
    """The picture, upright and in RGB."""
    return _open(path)[0]


def open_visual(paths: Sequence[Path], frames: int) -> Image.Image | Clip:
    """A picture; or a clip: a video, an animated picture, the pictures in a folder, or several pictures.

    Args:
        paths: one, or the frames of a clip.
        frames: how many of a video or an animated picture are taken, evenly spaced.
    """
    if frames < 1:
        raise VtcError(f"--frames is {frames}; use at least 1")
    path = paths[0]
    if len(paths) > 1:
        return _clip([open_image(path) for path in paths])
    if path.is_dir():
        return _clip([open_image(file) for file in _pictures_in(path)])
    if path.suffix.lower() in VIDEOS and path.is_file():
        return read(path, frames)
    found = _open(path)
    return found[0] if len(found) == 1 else _clip([found[number] for number in spread(len(found), frames)])


def _open(path: Path) -> list[Image.Image]:
    """A picture, or all pictures of an animated one."""
    try:
        with Image.open(path) as file:
            found = ImageSequence.Iterator(file) if file.format in MOVING else [file]
            return [ImageOps.exif_transpose(image).convert("RGB") for image in found]
    except FileNotFoundError:
        raise VtcError(f"there is no file {path}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's ways to say no
        raise VtcError(f"cannot read {path} as a picture; give a PNG or JPEG file") from error


def _pictures_in(folder: Path) -> list[Path]:
    """In the order of the numbers in their names: frame-10 behind frame-9."""
    known = Image.registered_extensions()
    found = [file for file in folder.iterdir() if file.suffix.lower() in known]
    if not found:
        raise VtcError(f"{folder} holds no pictures: give a picture, a video, or a folder with the frames of a clip")

    def numbers(file: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", file.name)]

    return sorted(found, key=numbers)


def _clip(frames: Sequence[Image.Image]) -> Clip:
    if len({frame.size for frame in frames}) > 1:
        raise VtcError("the frames of a clip must be of one size, and these are not")
    return Clip(np.stack([np.asarray(frame) for frame in frames]), tuple(range(len(frames))), len(frames))
