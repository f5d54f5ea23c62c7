"""An open video file: its pictures' stream, how many frames it has and when each is shown (PyAV).

Nothing is decoded here. The frame of index ``i`` is the ``i``-th in the order in which they are
shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_uhd.errors import UserError
from llava_uhd.images.pixels import MAX_PIXELS
from llava_uhd.images.stored import MediaFile, StoredFile

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

# Containers that are read. Others (playlists above all) would make FFmpeg open further files or
# addresses that they name.
CONTAINERS = tuple("mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,mxf,nut,ivf".split(","))
# Containers whose header tells a length that a file which was cut off does not reach.
TELLS_LENGTH = ("matroska", "flv")

# A file of more frames is refused: at 30 per second they would last 92 hours.
MAX_FRAMES = 10_000_000
# Rates outside are no rates of pictures, but a container that does not know.
MAX_RATE = 1000.0


class Timeline(NamedTuple):
    """The frames of a file as its packets tell them.

    Attributes:
        total: frames, from the first keyframe on.
        stamps: when each is shown, ascending, in ticks of the stream; None where the container
            does not tell reliably.
        keys: (shown, decoded) times of the keyframes in ticks, ascending; empty without `stamps`.
        last: how long the last frame is shown, in ticks; 0 if unknown.
    """

    total: int
    stamps: list[int] | None
    keys: list[tuple[int, int]]
    last: int


class VideoFile:
    """One open video file, for ``with``.

    Args:
        path: of the file. Never an address: nothing is fetched.

    Attributes:
        path: the same.
        av: the PyAV package.
        container: of PyAV, open.
        stream: of PyAV, the pictures.

    Raises:
        UserError: missing, empty, no video, without pictures, too large, or PyAV is not installed.
    """

    container: InputContainer
    stream: VideoStream

    def __init__(self, path: MediaFile) -> None:
        self.path = path
        self.av = import_av()
        if not isinstance(path, StoredFile):
            check_file(path)
        self._open()

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.container.close()

    def count(self) -> int:
        """Number of frames: as the header tells if it does, else by reading through the file.

        Raises:
            UserError: the file is cut off, or damaged.
        """
        if "timeline" not in self.__dict__ and self.listed is not None:
            return self.listed
        return self.timeline.total

    def fps(self) -> float:
        """Frames per second, on average."""
        rate = self.stream.average_rate or self.stream.guessed_rate
        told = float(rate) if rate else 0.0
        if self.listed is None or not 0 < told <= MAX_RATE:
            stamps = self.timeline.stamps
            if stamps is not None and stamps[-1] > stamps[0]:
                measured = (len(stamps) - 1) / self.seconds(stamps[-1] - stamps[0])
                # The header's rate is exact, if it is about these frames at all.
                if abs(told - measured) > 0.01 * measured:
                    told = measured
        return told if 0 < told <= MAX_RATE else 1.0

    def duration(self) -> float:
        """Seconds from the first frame to the end of the last."""
        total, stamps, _, last = self.timeline
        if stamps is None:
            return total / self.fps()
        return self.seconds(stamps[-1] - stamps[0]) + (self.seconds(last) or 1 / self.fps())

    def time(self, index: int) -> float:
        """Seconds after the first frame at which the frame of this index is shown."""
        stamps = self.timeline.stamps
        if stamps is None:
            return index / self.fps()
        return self.seconds(stamps[index] - stamps[0])

    def seconds(self, ticks: int) -> float:
        """Seconds of a difference between two times of the stream."""
        base: Any = self.stream.time_base
        return ticks * base.numerator / base.denominator

    @cached_property
    def listed(self) -> int | None:
        """Frames that an index in the header lists, without those that an edit cuts away.

        None: there is no such index.

        Raises:
            UserError: the file ends before the last of them.
        """
        entries = getattr(self.stream, "index_entries", None)
        if not self.is_format("mov") or not self.stream.frames or entries is None:
            return None
        self._check_reach()
        started = False
        count = 0
        for entry in entries:
            started = started or entry.is_keyframe
            count += started and entry.size > 0 and not entry.is_discard
        return self._sane(count) if count else None

    @cached_property
    def timeline(self) -> Timeline:
        """The frames of the file, read through without decoding.

        Raises:
            UserError: the file is cut off, or damaged.
        """
        listed = self.listed or 0
        stamps: list[Any] = []
        keys: list[tuple[Any, Any]] = []
        latest: tuple[int, int] = (0, 0)  # when the last frame is shown, and how long
        self.restart()
        with self.telling("it cannot be read through"):
            for packet in self.packets():
                if packet.size == 0:
                    continue
                if packet.is_keyframe:
                    keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
                if not packet.is_discard and not self._is_hidden(packet):
                    shown = (packet.pts or 0, packet.duration or 0)
                    latest = max(latest, shown) if stamps else shown
                    stamps.append(packet.pts)
                    self._sane(len(stamps))
        last = latest[1]
        self._check_complete(stamps, last, listed)
        # AVI numbers its packets in the order of decoding, raw streams do not number them.
        unknown = self.is_format("avi") or None in stamps or any(None in key for key in keys)
        if unknown or len(set(stamps)) < len(stamps):
            return Timeline(len(stamps), None, [], last)
        keys.sort()
        if not listed:
            # A piece of a longer stream: these refer to what came before it.
            stamps = [stamp for stamp in stamps if stamp >= keys[0][0]]
        return Timeline(len(stamps), sorted(stamps), keys, last)

    def packets(self) -> Iterator[Packet]:
        """Packets of the stream from the next keyframe on, then the empty one that ends decoding.

        What comes before the first keyframe cannot be decoded.
        """
        self._fresh = False
        started = False
        for packet in self.container.demux(self.stream):
            started = started or packet.is_keyframe or packet.size == 0
            if started:
                yield packet

    def restart(self) -> None:
        """Goes back to the first packet, with a new decoder."""
        if not self._fresh:
            self.container.close()
            self._open()

    def is_format(self, name: str) -> bool:
        """Whether the container is of this kind, one of `CONTAINERS`."""
        return name in self.container.format.name.split(",")

    def broken(self, what: str) -> UserError:
        """The error for a file that is not as it should be."""
        return UserError(
            f"video {self.path} is truncated or damaged: {what}; copy or download it again"
        )

    @contextmanager
    def telling(self, what: str) -> Iterator[None]:
        """Errors of FFmpeg as a `UserError` that names the file."""
        try:
            yield
        except (self.av.FFmpegError, MemoryError) as error:
            raise self.broken(f"{what} ({_reason(error)})") from error

    def _open(self) -> None:
        self.container = _open_container(self.av, self.path)
        self._fresh = True
        try:
            self.stream = self._choose_stream()
        except BaseException:
            self.container.close()
            raise

    def _choose_stream(self) -> VideoStream:
        """The largest stream of pictures that is no cover, set up for decoding."""
        cover = self.av.stream.Disposition.attached_pic
        streams = [each for each in self.container.streams.video if not each.disposition & cover]
        if not streams:
            kinds = {each.type for each in self.container.streams}
            if not kinds - {"data"}:
                raise self.broken("it holds no pictures")
            held = ", ".join(sorted(kinds)).replace("video", "a cover picture")
            raise UserError(f"video {self.path} has no moving pictures (it holds: {held})")
        streams = [each for each in streams if each.codec_context is not None]
        if not streams:
            raise UserError(
                f"video {self.path} is of a codec that this FFmpeg cannot decode: convert it to "
                "h264"
            )
        stream = max(streams, key=_pixels)
        if _pixels(stream) > MAX_PIXELS:
            context = stream.codec_context
            raise UserError(
                f"video {self.path} has frames of {context.width} x {context.height} pixels, more "
                f"than the limit of {MAX_PIXELS}: shrink it first"
            )
        # The workers of a data loader bring the parallelism.
        stream.codec_context.thread_count = 1
        return stream

    def _is_hidden(self, packet: Packet) -> bool:
        """Whether a packet of VP8 holds a picture that only other pictures refer to."""
        return self.stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10

    def _sane(self, count: int) -> int:
        if count > MAX_FRAMES:
            raise UserError(
                f"video {self.path} has more than {MAX_FRAMES} frames: cut it into shorter ones"
            )
        return count

    def _check_reach(self) -> None:
        """Whether the file goes on to the last byte that the index of an mp4 file lists."""
        size = self.container.size
        ends = (entry.pos + entry.size for entry in getattr(self.stream, "index_entries", ()))
        end = max(ends, default=0)
        if end > size:
            raise self.broken(f"its frames reach to byte {end}, the file to byte {size}")

    def _check_complete(self, stamps: list[Any], last: int, listed: int) -> None:
        """Compares what the packets held with what the header promises."""
        count, told = len(stamps), self.stream.frames
        if count == 0:
            raise self.broken("it holds not one frame")
        # An index in the header is exact, a mere number may be a little off.
        if count < listed or (not listed and count < told - max(2, told // 50)):
            raise self.broken(f"{count} of its {max(listed, told)} frames are there")
        if self.is_format("mov"):
            self._check_reach()
        if any(map(self.is_format, TELLS_LENGTH)) and None not in stamps:
            self._check_length(self.seconds(max(stamps) + last))

    def _check_length(self, end: float) -> None:
        """Compares the end of the last frame, in seconds, with the length in the header."""
        length = (self.container.duration or 0) / self.av.time_base
        enough = length - max(0.5, 0.01 * length)
        if end >= enough:
            return
        # The sound or the subtitles may go on longer than the pictures.
        with self.telling("it cannot be read through"), _open_container(self.av, self.path) as all_:
            for packet in all_.demux():
                if packet.pts is not None and packet.time_base:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if end < enough:
            raise self.broken(f"it ends after {end:.1f} of {length:.1f} seconds")


def import_av() -> ModuleType:
    """PyAV, which is optional.

    Raises:
        UserError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"reading a video needs PyAV ({error}): bash install.sh --extras video"
        ) from error
    return av


def check_file(path: Path) -> None:
    """Refuses what is no file with something in it.

    Raises:
        UserError: missing, empty, an address, or no regular file.
    """
    try:
        if not path.is_file():
            if ":/" in str(path) and not path.exists():
                what = "is an address: download it first, nothing is fetched"
            else:
                what = "is no regular file" if path.exists() else "does not exist"
            raise UserError(f"video {path} {what}")
        if path.stat().st_size == 0:
            raise UserError(f"video {path} is empty (0 bytes): copy or download it again")
    except OSError as error:
        name = f"{str(path)[:200]!r}"
        raise UserError(f"video {name} cannot be opened ({_reason(error)})") from error


def _open_container(av: ModuleType, path: MediaFile) -> InputContainer:
    # "file:" and the two lists: no name and no content makes FFmpeg open anything else.
    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(CONTAINERS)}
    if int(av.__version__.split(".")[0]) < 19:
        # Titles in odd encodings are no reason to refuse the pictures; later versions see to it.
        opened = {"metadata_errors": "replace"}
    else:
        opened = {}
    try:
        if isinstance(path, StoredFile):
            return av.open(path.open(), options=options, **opened)
        return av.open(f"file:{path.absolute()}", options=options, **opened)
    except PermissionError as error:
        raise UserError(f"video {path} cannot be opened ({_reason(error)})") from error
    except (av.FFmpegError, UnicodeError) as error:
        raise UserError(
            f"video {path} is not a video of a known kind ({', '.join(CONTAINERS)}), or its header "
            f"is truncated or damaged ({_reason(error)})"
        ) from error


def _reason(error: BaseException) -> str:
    """A short line of what went wrong."""
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())


def _pixels(stream: VideoStream) -> int:
    return int(stream.codec_context.width) * int(stream.codec_context.height)
