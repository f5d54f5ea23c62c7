"""Videos to frames: which frames of a video are taken, and when they are shown.

A video is a file, a folder of pictures, a list of pictures, or already read. ``docs/video.md`` has
the rules in words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple, TypeGuard

import numpy as np
from PIL import Image

from llava_uhd.config.model import VideoConfig
from llava_uhd.errors import UserError
from llava_uhd.images.pixels import open_image, to_rgb
from llava_uhd.images.stored import MediaFile, StoredFile
from llava_uhd.images.video_file import VideoFile
from llava_uhd.images.video_frames import check_pixels, first_size, read_frames

# Frames of a folder or list are taken to be this many per second apart (published).
FRAME_RATE = 2.0
# Names of pictures in a folder of frames; other files beside them are none.
FRAME_NAMES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")


class Video(NamedTuple):
    """Some frames of a video.

    Attributes:
        frames: RGB images, in the order of showing.
        times: seconds after the beginning at which each is shown.
        duration: length of the whole video in seconds.
    """

    frames: list[Image.Image]
    times: list[float]
    duration: float


VideoSource = str | PathLike[str] | StoredFile | Sequence[Image.Image] | Video


def read_video(source: VideoSource, config: VideoConfig) -> Video:
    """Reads the frames that the configuration asks for.

    Args:
        source: a video file; a folder of pictures, which are its frames in natural order
            (``frame2.jpg`` before ``frame10.jpg``); a list of PIL images; or a `Video`, which is
            passed through as it is. Of a folder or list every frame is taken, evenly chosen ones if
            they are more than ``config.max_frames``; half a second is taken to lie between them.
        config: how many frames, at what distances.

    Returns:
        At least one frame, RGB and upright. The times are those that the file tells, also where its
        rate varies. A frame that is taken twice (``force_sample``) is the same object.

    Raises:
        UserError: no video, a damaged one, one without pictures, or too large; the message names
            the file.
    """
    if isinstance(source, Video):
        return source
    if isinstance(source, str | PathLike | StoredFile):
        path = _as_file(source)
        if _is_folder(path):
            return _read_folder(path, config)
        return _read_file(path, config)
    images = _check_list(source)
    picks = _choose(len(images), config)
    turned = {index: to_rgb(images[index]) for index in dict.fromkeys(picks)}
    return _at_frame_rate([turned[index] for index in picks], picks, len(images))


def num_frames(source: VideoSource, config: VideoConfig) -> int:
    """How many frames `read_video` gives, without decoding any.

    The header of an mp4 or mov file tells; other files are read through.

    Raises:
        UserError: as for `read_video`, as far as it shows without decoding.
    """
    if isinstance(source, Video):
        return len(source.frames)
    if not isinstance(source, str | PathLike | StoredFile):
        return len(_choose(len(_check_list(source)), config))
    path = _as_file(source)
    if _is_folder(path):
        return len(_choose(len(frame_files(path)), config))
    with VideoFile(path) as file:
        return len(sample_indices(file.count(), file.fps(), config))


def frame_times(source: VideoSource, config: VideoConfig) -> tuple[list[float], float]:
    """``times`` and ``duration`` of what `read_video` gives, without decoding a frame.

    Raises:
        UserError: as for `read_video`, as far as it shows without decoding.
    """
    if isinstance(source, Video):
        return source.times, source.duration
    if not isinstance(source, str | PathLike | StoredFile):
        total = len(_check_list(source))
        return _times_at_frame_rate(_choose(total, config), total)
    path = _as_file(source)
    if _is_folder(path):
        total = len(frame_files(path))
        return _times_at_frame_rate(_choose(total, config), total)
    with VideoFile(path) as file:
        picks = sample_indices(file.timeline.total, file.fps(), config)
        return [file.time(index) for index in picks], file.duration()


def frame_size(source: VideoSource) -> tuple[int, int]:
    """(width, height) of the first frame in pixels, upright.

    Raises:
        UserError: as for `read_video`.
    """
    if isinstance(source, Video):
        return source.frames[0].size
    if not isinstance(source, str | PathLike | StoredFile):
        return to_rgb(_check_list(source)[0]).size
    path = _as_file(source)
    if _is_folder(path):
        return open_image(frame_files(path)[0]).size
    with VideoFile(path) as file:
        return first_size(file)


def sample_indices(total: int, fps: float, config: VideoConfig) -> list[int]:
    """Which frames of a video are taken (the published rule).

    Every ``round(fps / config.fps)``-th frame; if these are more than ``config.max_frames``, or
    with ``config.force_sample``, that many at even distances from the first to the last, cut to
    integers. 0 sets no bound.

    A video of 10 s at 25 frames per second has 250: with ``fps=1`` and ``max_frames=32`` the frames
    0, 25, ..., 225 (10 of them). With ``max_frames=4`` the frames 0, 83, 166, 249; so also with
    ``force_sample``, where ``max_frames=500`` gives 500 with repeats. With ``fps=2``: every 12th
    (12.5 is rounded to the even number), 21 frames. 100 frames at 0.4 per second: each one, where
    the published step of 0 is an error.

    Args:
        total: frames of the video, at least 1.
        fps: its frames per second.
        config: ``fps``, ``max_frames`` and ``force_sample``.

    Returns:
        Ascending indices, at least one.

    Raises:
        ValueError: no frames, or no rate.
    """
    if total < 1 or not 0 < fps < math.inf:
        raise ValueError(f"a video of {total} frames at {fps} per second")
    stride = max(round(min(fps / config.fps, total)), 1)
    every = range(0, total, stride)
    bound = config.max_frames
    if bound > 0 and (len(every) > bound or config.force_sample):
        # numpy's own arithmetic: exact division cuts some places to another integer.
        return [int(index) for index in np.linspace(0, total - 1, bound, dtype=int)]
    return list(every)


def time_instruction(video: Video) -> str:
    """The published sentence about the times of the frames, which goes before the first question.

    "The video lasts for 10.00 seconds, and 2 frames are uniformly sampled from it. These frames are
    located at 0.00s,5.00s.Please answer the following questions related to this video."
    """
    return time_sentence(video.times, video.duration)


def time_sentence(times: Sequence[float], duration: float) -> str:
    """`time_instruction` from the times of the frames and the length of the video in seconds."""
    places = ",".join(f"{time:.2f}s" for time in times)
    return (
        f"The video lasts for {duration:.2f} seconds, and {len(times)} frames are uniformly "
        f"sampled from it. These frames are located at {places}.Please answer the following "
        "questions related to this video."
    )


def frame_files(folder: Path) -> list[Path]:
    """Pictures in a folder of frames, in natural order; hidden files are none.

    Raises:
        UserError: there is none, or the folder cannot be read.
    """
    try:
        files = [each for each in folder.iterdir() if _is_frame(each)]
    except OSError as error:
        raise UserError(
            f"folder of frames {folder} cannot be read: {error.strerror or error}"
        ) from error
    if not files:
        raise UserError(
            f"folder {folder} has no pictures: a video is a file, or a folder of frames "
            f"({', '.join(FRAME_NAMES)})"
        )
    return sorted(files, key=lambda each: (_natural(each.name), each.name))


def _read_file(path: MediaFile, config: VideoConfig) -> Video:
    with VideoFile(path) as file:
        total = file.timeline.total
        picks = sample_indices(total, file.fps(), config)
        return Video(read_frames(file, picks), [file.time(i) for i in picks], file.duration())


def _read_folder(folder: Path, config: VideoConfig) -> Video:
    files = frame_files(folder)
    picks = _choose(len(files), config)
    opened: dict[int, Image.Image] = {}
    pixels = 0
    for index in dict.fromkeys(picks):
        opened[index] = open_image(files[index])
        pixels += opened[index].width * opened[index].height
        check_pixels(pixels, f"folder of frames {folder}", len(opened))
    return _at_frame_rate([opened[index] for index in picks], picks, len(files))


def _choose(total: int, config: VideoConfig) -> list[int]:
    """Frames of a folder or list, which somebody chose already: all, or evenly as many as fit."""
    return sample_indices(total, config.fps, config)


def _at_frame_rate(frames: list[Image.Image], picks: list[int], total: int) -> Video:
    return Video(frames, *_times_at_frame_rate(picks, total))


def _times_at_frame_rate(picks: Sequence[int], total: int) -> tuple[list[float], float]:
    return [index / FRAME_RATE for index in picks], total / FRAME_RATE


def _check_list(source: Sequence[Image.Image]) -> Sequence[Image.Image]:
    if not isinstance(source, Sequence):
        raise UserError(
            f"a video must be a path, a list of PIL images or a Video, got {type(source).__name__}"
        )
    if not source:
        raise UserError("a video has no frames: the list is empty")
    for index, each in enumerate(source):
        if not isinstance(each, Image.Image):
            raise UserError(
                f"frame {index} of a video must be a PIL image, got {type(each).__name__}"
            )
    return source


def _as_file(source: str | PathLike[str] | StoredFile) -> MediaFile:
    return source if isinstance(source, StoredFile) else Path(source)


def _is_folder(path: MediaFile) -> TypeGuard[Path]:
    if isinstance(path, StoredFile):
        return False
    try:
        return path.is_dir()
    except OSError:  # a name that no file can have: opening it as a file will say so
        return False


def _is_frame(path: Path) -> bool:
    named = path.suffix.lower() in FRAME_NAMES and not path.name.startswith(".")
    return named and path.is_file()


def _natural(name: str) -> list[str | int]:
    """Key for sorting: numbers in the name count as numbers."""
    parts = re.split("([0-9]+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]
