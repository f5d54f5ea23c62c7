"""The few wanted frames of a video file, decoded with PyAV.

The decoder starts at the last keyframe before a wanted frame and leaves out what no other frame
refers to, so a few frames of a long video cost a few stretches of it. The pixels are those of
decoding everything from the start, and where jumping does not find a frame that is what is done.
At most one other frame is held beside the wanted ones.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from llava_uhd.errors import UserError
from llava_uhd.images.pixels import MAX_PIXELS, to_rgb
from llava_uhd.images.video_file import Timeline, VideoFile

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

# The pictures of one video may have this many pixels together: 6 GB as RGB.
MAX_VIDEO_PIXELS = 2_000_000_000
# A keyframe this many frames after a wanted one is worth a jump; nearer ones are decoded through.
MIN_JUMP = 8
# Packets in a row that may have no picture of their own.
MAX_REPEATS = 2

Key = tuple[int, int]

# By the rows (a, b) and (c, d) of a display matrix: a pixel at (x, y), y pointing down, is shown at
# (a x + c y, b x + d y).
UPRIGHT = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


class _MissedError(Exception):
    """A wanted frame did not come out of the decoder after a jump."""


def read_frames(file: VideoFile, indices: Sequence[int]) -> list[Image.Image]:
    """Decodes the frames of these indices.

    Args:
        file: open.
        indices: below its count, in any order; repeated ones share their picture.

    Returns:
        RGB images, upright, one per index.

    Raises:
        UserError: a frame that the file promises cannot be decoded, or they are too large.
    """
    return _Reader(file).read(indices)


def first_size(file: VideoFile) -> tuple[int, int]:
    """(width, height) of the first frame in pixels, upright; that frame is decoded."""
    file.restart()
    with file.telling("its first frame cannot be decoded"):
        for frame, _ in _decode(file):
            width, height = frame.width, frame.height
            return (height, width) if _swaps(_turn(frame)) else (width, height)
    raise file.broken("its first frame cannot be decoded")


def check_pixels(pixels: int, name: str, count: int) -> None:
    """Refuses to hold more than `MAX_VIDEO_PIXELS`.

    Args:
        pixels: of all frames together.
        name: of the video.
        count: number of frames.

    Raises:
        UserError: they are too many.
    """
    if pixels > MAX_VIDEO_PIXELS:
        raise UserError(
            f"{name}: {count} frames of together {pixels} pixels are more than the limit of "
            f"{MAX_VIDEO_PIXELS}: lower video.max_frames or video.fps, or shrink it first"
        )


class _Reader:
    """One reading; counts the pixels that it holds."""

    def __init__(self, file: VideoFile) -> None:
        self.file = file
        self.name = f"video {file.path}"
        # Frames stay behind as garbage, with the threads that converted them; collected in a forked
        # worker they would wait for threads that it does not have. Older versions start none.
        threads = "threads" in (file.av.VideoFrame.reformat.__doc__ or "")
        self.options: dict[str, Any] = {"threads": 1} if threads else {}
        self.held = 0

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        wanted = sorted(set(indices))
        context = self.file.stream.codec_context
        check_pixels(len(wanted) * context.width * context.height, self.name, len(wanted))
        stamps = self.file.timeline.stamps
        if stamps is None:
            found = self._in_order(wanted)
        else:
            shown = self._by_stamp(self.file.timeline, [stamps[index] for index in wanted])
            found = {index: shown[stamps[index]] for index in wanted}
        return [found[index] for index in indices]

    def _by_stamp(self, timeline: Timeline, wanted: list[int]) -> dict[int, Image.Image]:
        """Pictures by the times at which they are shown, jumping from keyframe to keyframe."""
        found: dict[int, Image.Image] = {}
        groups = group_by_key(timeline, wanted)
        for place, (key, stamps) in enumerate(groups):
            try:
                found.update(self._from_key(key, stamps))
            except _MissedError:
                if key == timeline.keys[0]:
                    found.update(self._from_start(stamps))
                    continue
                # Jumps do not work in this file: the rest in one go.
                rest = [stamp for _, each in groups[place:] for stamp in each]
                found.update(self._from_start(rest))
                break
        return found

    def _from_key(self, key: Key, wanted: list[int]) -> dict[int, Image.Image]:
        """Pictures of wanted times, ascending, decoded from a keyframe."""
        found: dict[int, Image.Image] = {}
        rest = set(wanted)
        try:
            self.file.container.seek(min(key), stream=self.file.stream, backward=True)
            for frame, sound in _decode(self.file, rest):
                if frame.pts is None or frame.pts > wanted[-1] or not sound:
                    break
                if frame.pts in rest:
                    found[frame.pts] = self._picture(frame)
                    if len(found) == len(wanted):
                        return found
        except self.file.av.FFmpegError as error:
            raise _MissedError from error
        raise _MissedError

    def _from_start(self, wanted: list[int]) -> dict[int, Image.Image]:
        """Pictures of wanted times, ascending, everything decoded."""
        found: dict[int, Image.Image] = {}
        rest = wanted[::-1]
        before: VideoFrame | None = None
        self.file.restart()
        with self.file.telling(f"it cannot be decoded up to {self._second(wanted[-1])}"):
            for frame, sound in _decode(self.file):
                if frame.pts is None:
                    continue
                while rest and frame.pts >= rest[-1]:
                    shown = frame if frame.pts == rest[-1] else self._instead(rest[-1], before)
                    if not sound:
                        raise self.file.broken(f"the frame at {self._second(rest[-1])} is damaged")
                    found[rest.pop()] = self._picture(shown or frame)
                if not rest:
                    return found
                before = frame
        raise self.file.broken(f"the frame at {self._second(rest[-1])} cannot be decoded")

    def _instead(self, wanted: int, before: VideoFrame | None) -> VideoFrame | None:
        """What is on the screen at a time whose packet had no picture of its own.

        Args:
            wanted: the time.
            before: the last frame before it.

        Returns:
            That frame, or None for the first of the file where the time lies before the first
            keyframe (a video that was cut without being coded anew).

        Raises:
            UserError: more packets than one or two have no picture: they are damaged.
        """
        timeline = self.file.timeline
        assert timeline.stamps is not None
        if before is None and wanted < timeline.keys[0][0]:
            return None
        if before is not None and before.pts is not None:
            place = bisect_left(timeline.stamps, wanted)
            if place - bisect_left(timeline.stamps, before.pts) <= MAX_REPEATS:
                return before
        raise self.file.broken(f"the frame at {self._second(wanted)} cannot be decoded")

    def _in_order(self, wanted: list[int]) -> dict[int, Image.Image]:
        """Pictures of wanted indices, ascending, everything decoded and counted."""
        found: dict[int, Image.Image] = {}
        self.file.restart()
        with self.file.telling(f"it cannot be decoded up to frame {wanted[-1]}"):
            for index, (frame, sound) in enumerate(_decode(self.file)):
                if index == wanted[len(found)]:
                    if not sound:
                        raise self.file.broken(f"frame {index} is damaged")
                    found[index] = self._picture(frame)
                    if len(found) == len(wanted):
                        return found
        raise self.file.broken(f"frame {wanted[len(found)]} cannot be decoded")

    def _picture(self, frame: VideoFrame) -> Image.Image:
        """RGB image of a decoded frame, upright; transparency is laid over white."""
        pixels = frame.width * frame.height
        if pixels > MAX_PIXELS:
            raise self.file.broken(f"a frame has {frame.width} x {frame.height} pixels")
        self.held += pixels
        check_pixels(self.held, self.name, 1)
        if any(part.is_alpha for part in frame.format.components):
            image = to_rgb(Image.fromarray(frame.to_ndarray(format="rgba", **self.options)))
        else:
            image = frame.to_image(**self.options)
        turn = _turn(frame)
        return image if turn is None else image.transpose(turn)

    def _second(self, stamp: int) -> str:
        stamps = self.file.timeline.stamps
        assert stamps is not None
        return f"{self.file.seconds(stamp - stamps[0]):.2f} s"


def group_by_key(timeline: Timeline, wanted: Sequence[int]) -> list[tuple[Key, list[int]]]:
    """The keyframes to start decoding from, each with the wanted times that are reached from there.

    Args:
        timeline: with stamps.
        wanted: some of its stamps, ascending.

    A keyframe is a start if `MIN_JUMP` frames or more lie between it and the last wanted one: with
    keyframes at 0, 30, 60, 90 and 5, 29, 31, 80 wanted, from 0: 5, 29, 31 (the keyframe at 30 is
    too near to 29), then from 60: 80.
    """
    assert timeline.stamps is not None
    shown = [key for key, _ in timeline.keys]
    groups: list[tuple[Key, list[int]]] = []
    here = -1
    for stamp in wanted:
        key = max(bisect_right(shown, stamp) - 1, 0)
        if key > here:
            place = bisect_left(timeline.stamps, shown[key])
            if not groups or place - bisect_left(timeline.stamps, groups[-1][1][-1]) >= MIN_JUMP:
                groups.append((timeline.keys[key], []))
            here = key
        groups[-1][1].append(stamp)
    return groups


def _decode(file: VideoFile, wanted: set[int] | None = None) -> Iterator[tuple[VideoFrame, bool]]:
    """What the decoder gives, in the order of showing, and whether it is sound.

    Args:
        file: at the place to start from.
        wanted: of other times than these, frames that no frame refers to are left out.

    Frames after a damaged one refer to it, until the next keyframe.
    """
    context = file.stream.codec_context
    sound = True
    for packet in file.packets():
        if wanted is not None:
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        for frame in packet.decode():
            sound = not frame.is_corrupt and (sound or bool(frame.key_frame))
            yield frame, sound


def _turn(frame: VideoFrame) -> Image.Transpose | None:
    """What turns the stored picture upright."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return None
    values = struct.unpack("=9i", bytes(matrix)[:36])
    a, b, c, d = (round(values[place] / 65536) for place in (0, 1, 3, 4))
    return UPRIGHT.get((a, b, c, d))


def _swaps(turn: Image.Transpose | None) -> bool:
    """Whether width and height change their places."""
    return turn in (
        Image.Transpose.ROTATE_90,
        Image.Transpose.ROTATE_270,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.TRANSVERSE,
    )
