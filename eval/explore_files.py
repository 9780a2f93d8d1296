"""What may be given to `vtc explore`: pictures and clips of a bounded size, looked at before any of it is decoded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from vtc.errors import VtcError
from vtc.eval.lmms.clips import Clip
from vtc.eval.pictures import VIDEOS, open_visual

MAX_BYTES = 100 * 2**20
MAX_PIXELS = 40_000_000  # of a picture; of an animated one, all its frames together
MAX_FRAME = 3840 * 2160  # pixels of a frame of a video
MAX_SECONDS = 60
MAX_FRAMES = 60 * MAX_SECONDS
PICTURES = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow's names; others can start programs
# FFmpeg's names; others can be lists of further files, or of addresses.
CONTAINERS = "avi,matroska,mov,mp4,m4a,3gp,3g2,mj2,mpeg,mpegts,mpegvideo,webm"


def open_file(path: Path, frames: int) -> Image.Image | Clip:
    """The picture in a file, or `frames` evenly spaced frames of the video or the animated picture.

    Raises:
        VtcError: it is neither, or it is too large.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise VtcError(f"{path.name} has {size / 2**20:.0f} MB; use at most {MAX_BYTES // 2**20}")
    if path.suffix.lower() in VIDEOS:
        _check_video(path)
    else:
        _check_picture(path)
    try:
        return open_visual([path], frames)
    except VtcError as error:  # the path is one of the server's own, which tells the user nothing
        raise VtcError(str(error).replace(str(path), path.name)) from error


def _check_picture(path: Path) -> None:
    Image.init()  # or not all of the formats are known
    large = VtcError(f"{path.name} has more than {MAX_PIXELS:,} pixels, all frames together; give a smaller one")
    try:
        with Image.open(path, formats=PICTURES) as file:  # reads the header
            pixels = file.width * file.height * getattr(file, "n_frames", 1)
    except Image.DecompressionBombError:
        raise large from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's ways to say no
        raise VtcError(f"{path.name} cannot be read as a picture; give a PNG or JPEG file") from error
    if pixels > MAX_PIXELS:
        raise large


def _check_video(path: Path) -> None:
    """Packets are counted rather than believing what the header says."""
    if find_spec("av") is None:
        raise VtcError("videos need PyAV: pip install av (an animated GIF does without)")
    import av

    frames, seconds = 0, 0.0
    try:
        with av.open(str(path), container_options={"format_whitelist": CONTAINERS}) as container:
            stream = container.streams.video[0]
            pixels = stream.codec_context.width * stream.codec_context.height
            for packet in container.demux(stream):
                frames += 1
                if packet.pts is not None and packet.time_base is not None:
                    seconds = max(seconds, float((packet.pts - (stream.start_time or 0)) * packet.time_base))
                if frames > MAX_FRAMES or seconds > MAX_SECONDS:
                    break
    except (av.error.FFmpegError, IndexError) as error:  # IndexError: it has sound only
        raise VtcError(f"{path.name} cannot be read as a video; give an MP4 or WebM file") from error
    if frames > MAX_FRAMES or seconds > MAX_SECONDS:
        raise VtcError(f"{path.name} is too long; use at most {MAX_SECONDS} seconds and {MAX_FRAMES} frames")
    if pixels > MAX_FRAME:
        raise VtcError(
            f"the frames of {path.name} have {pixels:,} pixels; use at most {MAX_FRAME:,}, as 3840 x 2160 have"
        )
