"""Reading frames of a video file with PyAV, decord or torchcodec: the same frames, whichever is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from vtc.errors import VtcError, did_you_mean


@dataclass(frozen=True)
class Clip:
    """Frames of a video.

    Attributes:
        frames: (T, H, W, 3) uint8.
        indices: their places in the file.
        total: number of frames in the file.
        fps: frames per second of the file; `None` if unknown.
    """

    frames: np.ndarray
    indices: tuple[int, ...]
    total: int
    fps: float | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """What processors want to know, to tell the model the time of each frame."""
        return {"total_num_frames": self.total, "fps": self.fps, "frames_indices": list(self.indices)}


def spread(total: int, count: int) -> tuple[int, ...]:
    """`count` places among `total` frames, evenly spaced from the first to the last; all, if there are fewer."""
    if total <= count:
        return tuple(range(total))
    return tuple(np.linspace(0, total - 1, count, dtype=int).tolist())


def read(source: Any, count: int, reader: str = "auto") -> Clip:
    """`count` evenly spaced frames of a video file, or the frames that are given as an array (T, H, W, 3).

    Args:
        source: a path or an array.
        count: at most this many frames of a file; an array is taken as it is.
        reader: one of `READERS`, or `"auto"` for the first that is installed.

    Raises:
        VtcError: the file is missing or cannot be decoded, or no reader is installed.
    """
    if not isinstance(source, str | Path):
        frames = np.asarray(source)
        if frames.ndim != 4 or frames.shape[-1] != 3:
            raise VtcError(f"a clip is a file or an array (T, H, W, 3), not one of shape {frames.shape}")
        return Clip(frames, tuple(range(len(frames))), len(frames))
    name = choose(reader)
    if not Path(source).is_file():
        raise VtcError(f"there is no video file {source}")
    try:
        clip = READERS[name](str(source), count)
    except Exception as error:  # each reader has its own ways to fail
        raise VtcError(f"{name} cannot read {source}: {error}") from error
    if not clip.indices:
        raise VtcError(f"{name} finds no frames in {source}")
    return clip


def choose(reader: str = "auto") -> str:
    """The reader to use. `"auto"` takes the first that is installed."""
    if reader != "auto":
        if reader not in READERS:
            raise VtcError(f"unknown video reader '{reader}'{did_you_mean(reader, READERS)}; use {', '.join(READERS)}")
        if not _installed(reader):
            raise VtcError(f"the video reader {reader} is not installed, or its libraries are missing")
        return reader
    for name in READERS:
        if _installed(name):
            return name
    raise VtcError("no video reader is installed; pip install av (or decord, or torchcodec with FFmpeg)")


def _installed(reader: str) -> bool:
    if find_spec(MODULES[reader]) is None:
        return False
    if reader != "torchcodec":
        return True
    try:  # it installs without FFmpeg, and then does not load
        import torchcodec  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


def _pyav(path: str, count: int) -> Clip:
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        total, rate = stream.frames, stream.average_rate
    if not total:  # not every container says; counting is decoding
        total = sum(1 for _ in _decode(path))
    indices = spread(total, count)
    wanted = set(indices)
    found: list[np.ndarray] = []
    number = -1
    for number, frame in enumerate(_decode(path)):
        if number in wanted:
            found.append(frame.to_ndarray(format="rgb24"))
        if number == indices[-1]:
            break
    if len(found) < len(indices):  # the container promised more frames than there are
        total = number + 1
        return _pick(path, spread(total, count), total, rate)
    return Clip(np.stack(found), indices, total, None if rate is None else float(rate))


def _pick(path: str, indices: Sequence[int], total: int, rate: Any) -> Clip:
    frames = [frame.to_ndarray(format="rgb24") for number, frame in enumerate(_decode(path)) if number in set(indices)]
    return Clip(np.stack(frames), tuple(indices), total, None if rate is None else float(rate))


def _decode(path: str) -> Any:
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield from container.decode(stream)


def _decord(path: str, count: int) -> Clip:
    import decord

    video = decord.VideoReader(path, num_threads=1)
    indices = spread(len(video), count)
    return Clip(video.get_batch(list(indices)).asnumpy(), indices, len(video), float(video.get_avg_fps()))


def _torchcodec(path: str, count: int) -> Clip:
    from torchcodec.decoders import VideoDecoder

    video = VideoDecoder(path)
    total = len(video)
    indices = spread(total, count)
    frames = video.get_frames_at(indices=list(indices)).data  # (T, 3, H, W)
    return Clip(frames.permute(0, 2, 3, 1).numpy(), indices, total, video.metadata.average_fps)


READERS: dict[str, Callable[[str, int], Clip]] = {"pyav": _pyav, "decord": _decord, "torchcodec": _torchcodec}
MODULES = {"pyav": "av", "decord": "decord", "torchcodec": "torchcodec"}
