"""Small videos made with PyAV. Each picture carries its number, so a test sees which one it got."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

BITS = 8
# Rows (a, b), (c, d) of a display matrix, by the PIL operation that turns the picture upright.
MATRICES = {
    None: (1, 0, 0, 1),
    Image.Transpose.ROTATE_270: (0, 1, -1, 0),
    Image.Transpose.ROTATE_180: (-1, 0, 0, -1),
    Image.Transpose.ROTATE_90: (0, -1, 1, 0),
    Image.Transpose.FLIP_LEFT_RIGHT: (-1, 0, 0, 1),
    Image.Transpose.FLIP_TOP_BOTTOM: (1, 0, 0, -1),
    Image.Transpose.TRANSPOSE: (0, 1, 1, 0),
    Image.Transpose.TRANSVERSE: (0, -1, -1, 0),
}


def picture(index: int, width: int = 96, height: int = 64) -> np.ndarray:
    """uint8 (height, width, 3): the bits of the index as bars in the upper half, a hill below."""
    pixels = np.zeros((height, width, 3), np.uint8)
    bar = width // BITS
    for bit in range(BITS):
        pixels[: height // 2, bit * bar : (bit + 1) * bar] = 235 if index >> bit & 1 else 20
    place = np.arange(width)[None] + 3 * index + 2 * np.arange(height - height // 2)[:, None]
    hill = 128 + 90 * np.sin(place / 9)
    pixels[height // 2 :] = np.stack([hill, hill / 2, 255 - hill], -1)
    return pixels


def number(image: Image.Image) -> int:
    """The index that a picture carries."""
    pixels = np.asarray(image.convert("L"), np.float64)[4 : image.height // 2 - 4]
    bar = image.width // BITS
    light = [pixels[:, bit * bar + 2 : (bit + 1) * bar - 2].mean() > 128 for bit in range(BITS)]
    return sum(int(on) << bit for bit, on in enumerate(light))


def write_video(
    path: Path,
    frames: int = 96,
    rate: int = 24,
    size: tuple[int, int] = (96, 64),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    milliseconds: Sequence[int] | None = None,
) -> Path:
    """Writes a video of numbered pictures.

    Args:
        path: its ending chooses the container.
        frames: how many.
        rate: per second.
        size: (width, height).
        codec: of FFmpeg.
        pix_fmt: of FFmpeg.
        options: of the codec.
        container: options of the container.
        milliseconds: when each frame is shown, instead of `rate`.
    """
    with av.open(str(path), "w", options=container or {}) as output:
        stream: Any = output.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.options = options or {}
        # Threads of an encoder that is collected in a forked process would be waited for for ever.
        stream.codec_context.thread_count = 1
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(index, *size), format="rgb24")
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[index], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def write_pixels(path: Path, pixels: np.ndarray, codec: str, pix_fmt: str) -> Path:
    """Writes a video of three equal pictures, (height, width, 3 or 4) uint8, without loss."""
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream(codec, rate=10)
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = pix_fmt
        stream.options = {"crf": "0"} if "264" in codec else {}
        frame = av.VideoFrame.from_ndarray(pixels, format=("rgb24", "rgba")[pixels.shape[2] - 3])
        for index in range(3):
            frame.pts = index
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def write_streams(
    path: Path,
    sizes: Sequence[tuple[int, int]] = (),
    cover: tuple[int, int] | None = None,
    sound: float = 0,
) -> Path:
    """Writes several streams into one file: pictures of these sizes, 20 each, 10 per second.

    Args:
        path: its ending chooses the container.
        sizes: (width, height) of the streams of moving pictures.
        cover: size of a cover picture, which stands first.
        sound: seconds of silence.
    """
    with av.open(str(path), "w") as output:
        streams: list[Any] = []
        if cover is not None:
            streams.append(output.add_stream("mjpeg", rate=10))
            streams[0].disposition = av.stream.Disposition.attached_pic
            streams[0].pix_fmt = "yuvj420p"
        for _ in sizes:
            streams.append(output.add_stream("libx264", rate=10))
            streams[-1].pix_fmt = "yuv420p"
        covers = [] if cover is None else [cover]
        for stream, size in zip(streams, [*covers, *sizes], strict=True):
            stream.width, stream.height = size
        voice: Any = output.add_stream("aac", rate=16000, layout="mono") if sound else None
        for index in range(20):
            for stream in streams[1 if cover and index else 0 :]:
                pixels = picture(index, stream.width, stream.height)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 10)
                output.mux(stream.encode(frame))
        for start in range(0, round(sound * 16000), 1000):
            silence = np.zeros((1, 1000), np.float32)
            samples = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            samples.rate, samples.pts = 16000, start
            output.mux(voice.encode(samples))
        for stream in [*streams, *([voice] if sound else [])]:
            output.mux(stream.encode())
    return path


def copy_packets(
    source: Path, target: Path, change: Callable[[int, bytes], bytes | None], shift: float = 0
) -> Path:
    """Copies a video without decoding it.

    Args:
        source: read.
        target: written.
        change: what becomes of the data of each packet, by its number in the file; None drops it.
        shift: seconds that all times are moved back; what gets below 0 is cut away by an edit list.
    """
    with av.open(str(source)) as read, av.open(str(target), "w") as output:
        stream = read.streams.video[0]
        copy = output.add_stream_from_template(stream)
        ticks = int(shift / stream.time_base)
        count = 0
        for packet in read.demux(stream):
            if packet.size == 0:
                continue
            data = change(count, bytes(packet))
            count += 1
            if data is None:
                continue
            changed = av.Packet(data)
            changed.pts = packet.pts - ticks
            changed.dts = None if packet.dts is None else packet.dts - ticks
            changed.duration, changed.time_base = packet.duration, packet.time_base
            changed.is_keyframe = packet.is_keyframe
            changed.stream = copy
            output.mux(changed)
    return target


def turn_mp4(source: Path, target: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Copies an mp4 file with another display matrix: rows (a, b) and (c, d)."""
    data = bytearray(source.read_bytes())
    header = data.index(b"tkhd") + 4
    place = header + 4 + (32 if data[header] else 20) + 16
    a, b, c, d = (value * 65536 for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    target.write_bytes(data)
    return target


def cut_file(source: Path, target: Path, share: float) -> Path:
    """Copies the first part of a file, a share of its bytes."""
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def decode_all(path: Path) -> list[Image.Image]:
    """Every picture, the plain way, not turned."""
    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]
