"""Odd, damaged and hostile videos: read rightly, or refused in one line that names the file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from fixtures_video import (
    MATRICES,
    copy_packets,
    cut_file,
    decode_all,
    number,
    turn_mp4,
    write_pixels,
    write_streams,
    write_video,
)
from PIL import Image

from llava_uhd.config.model import VideoConfig
from llava_uhd.errors import UserError
from llava_uhd.images import video_file, video_frames
from llava_uhd.images.video import frame_size, num_frames, read_video, sample_indices
from llava_uhd.images.video_file import VideoFile

EVERY = VideoConfig(fps=999, max_frames=0)
FEW = VideoConfig(max_frames=4, force_sample=True)
KEYS = {"g": "12", "bf": "2"}


def refused(path: Path, match: str, config: VideoConfig = EVERY, count: bool = True) -> None:
    """Reading, and counting if it can tell, end with one line that names the file."""
    asks = [
        lambda: read_video(path, config),
        *([lambda: num_frames(path, config)] if count else []),
    ]
    for ask in asks:
        with pytest.raises(UserError, match=match) as caught:
            ask()
        assert path.name in str(caught.value) and "\n" not in str(caught.value)


def numbers(path: Path, config: VideoConfig = EVERY) -> list[int]:
    """What is read, after checking that it was counted rightly."""
    video = read_video(path, config)
    assert num_frames(path, config) == len(video.frames) == len(video.times)
    return [number(frame) for frame in video.frames]


@pytest.mark.parametrize("turn", MATRICES)
def test_turned_pictures_are_shown_upright(tmp_path: Path, turn: Image.Transpose | None) -> None:
    path = write_video(tmp_path / "clip.mp4", 6)
    turned = turn_mp4(path, tmp_path / "turned.mp4", MATRICES[turn])
    for config in (EVERY, FEW):
        for stored, shown in zip(
            read_video(path, config).frames, read_video(turned, config).frames, strict=True
        ):
            expected = stored if turn is None else stored.transpose(turn)
            assert shown.size == expected.size and shown.tobytes() == expected.tobytes()
    assert frame_size(turned) == expected.size


def test_display_matrix_moves_a_pixel_as_it_says() -> None:
    mark = Image.new("L", (5, 3))
    mark.putpixel((1, 0), 255)
    for turn, (a, b, c, d) in MATRICES.items():
        if turn is not None:
            # The middle of the pixel, measured from the middle of the picture.
            x, y = 1 - 2, 0 - 1
            shown = np.asarray(mark.transpose(turn))
            middle = ((shown.shape[1] - 1) // 2, (shown.shape[0] - 1) // 2)
            assert shown[b * x + d * y + middle[1], a * x + c * y + middle[0]] == 255
            assert video_frames.UPRIGHT[(a, b, c, d)] == turn


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "size", "error"),
    [
        ("full_range.mp4", "libx264", "yuvj420p", (128, 96), 2.0),
        ("ten_bits.mp4", "libx264", "yuv420p10le", (128, 96), 2.0),
        ("odd.mp4", "libx264", "yuv444p", (127, 95), 1.0),
        ("odd_part2.mp4", "mpeg4", "yuv420p", (127, 95), 2.0),
        ("exact.mkv", "ffv1", "rgb48le", (126, 95), 0.0),
        ("planes.mkv", "libx264rgb", "rgb24", (126, 95), 0.0),
        ("raw.avi", "rawvideo", "yuyv422", (126, 96), 4.0),
        ("grey.mkv", "ffv1", "gray", (127, 95), 1.0),
        ("grey_ten_bits.mkv", "ffv1", "gray10le", (127, 95), 1.0),
    ],
)
def test_pixel_formats_and_odd_sizes(
    tmp_path: Path, name: str, codec: str, pix_fmt: str, size: tuple[int, int], error: float
) -> None:
    width, height = size
    pixels = np.full((height, width, 3), 60, np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    if pix_fmt.startswith("gray"):
        pixels[:] = pixels[..., :1]
    path = write_pixels(tmp_path / name, pixels, codec, pix_fmt)
    video = read_video(path, EVERY)
    assert len(video.frames) == 3 and {frame.size for frame in video.frames} == {size}
    for frame in video.frames:
        assert frame.mode == "RGB"
        assert np.abs(np.asarray(frame).astype(int) - pixels).mean(axis=(0, 1)).max() <= error


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    pixels = np.full((96, 127, 4), 255, np.uint8)
    pixels[..., :3] = (200, 30, 60)
    pixels[:10, :, 3] = 0
    frame = read_video(write_pixels(tmp_path / "a.mov", pixels, "png", "rgba"), EVERY).frames[1]
    shown = np.asarray(frame)
    assert (shown[:10] == 255).all() and (shown[10:] == (200, 30, 60)).all()


def test_which_stream_holds_the_pictures(tmp_path: Path) -> None:
    two = write_streams(tmp_path / "two.mkv", [(64, 48), (128, 96)], sound=6)
    assert frame_size(two) == (128, 96) and numbers(two) == list(range(20))
    covered = write_streams(tmp_path / "cover.mp4", [(64, 48)], cover=(512, 512))
    assert frame_size(covered) == (64, 48) and numbers(covered) == list(range(20))
    sound = write_streams(tmp_path / "sound.mp4", sound=1)
    refused(sound, r"has no moving pictures \(it holds: audio\)")
    song = write_streams(tmp_path / "song.mp4", cover=(512, 512), sound=1)
    refused(song, r"has no moving pictures \(it holds: audio, a cover picture\)")
    data = write_video(tmp_path / "a.mp4", 3).read_bytes()
    (tmp_path / "strange.mp4").write_bytes(data.replace(b"avc1", b"zzzz"))
    refused(tmp_path / "strange.mp4", "of a codec that this FFmpeg cannot decode")


def test_frames_cut_away_by_an_edit(tmp_path: Path) -> None:
    for codec in ("libx264", "mpeg4"):
        clip = write_video(tmp_path / "clip.mp4", codec=codec, options=KEYS)
        edited = copy_packets(clip, tmp_path / "edited.mp4", lambda _, data: data, shift=1.25)
        with VideoFile(edited) as file:
            assert file.listed == file.timeline.total == 66 < file.stream.frames
        assert numbers(edited) == list(range(30, 96))
        video = read_video(edited, FEW)
        assert [number(frame) for frame in video.frames] == [30, 51, 73, 95]
        assert video.times == pytest.approx([0, 21 / 24, 43 / 24, 65 / 24])
        everything = decode_all(edited)
        for frame, index in zip(video.frames, (0, 21, 43, 65), strict=True):
            assert frame.tobytes() == everything[index].tobytes()


def test_piece_of_a_stream(tmp_path: Path) -> None:
    """What comes before the first keyframe is neither counted nor shown."""
    options = {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}
    clip = write_video(tmp_path / "clip.ts", options=options)
    piece = copy_packets(clip, tmp_path / "piece.ts", lambda n, data: data if n > 16 else None)
    found = numbers(piece)
    assert found == list(range(found[0], 96)) and 16 < found[0] < 30
    assert numbers(piece, FEW) == [found[i] for i in sample_indices(len(found), 24, FEW)]


def test_pictures_of_vp8_that_are_only_referred_to(tmp_path: Path) -> None:
    def hide(index: int, data: bytes) -> bytes:
        return bytes([data[0] & ~0x10]) + data[1:] if index in (7, 20) else data

    clip = write_video(tmp_path / "clip.webm", 30, codec="libvpx")
    hidden = copy_packets(clip, tmp_path / "hidden.webm", hide)
    assert numbers(hidden) == [index for index in range(30) if index not in (7, 20)]


def test_packet_without_a_picture(tmp_path: Path) -> None:
    """The one before stays on the screen; more of them in a row are damage."""
    clip = write_video(tmp_path / "clip.mp4", 40, codec="mpeg4", options={"g": "99"})

    def empty(*places: int) -> Path:
        # A picture that says it is not coded: its start code, "predicted", times, no data.
        blank = bytes.fromhex("000001b6") + b"\x50\x00\x00\x7f"
        change = lambda index, data: blank if index in places else data  # noqa: E731
        return copy_packets(clip, tmp_path / "empty.mp4", change)

    path = empty(20)
    everything = decode_all(path)
    frames = read_video(path, EVERY).frames
    assert (len(everything), len(frames), num_frames(path, EVERY)) == (39, 40, 40)
    everything.insert(20, everything[19])
    assert [each.tobytes() for each in frames] == [each.tobytes() for each in everything]
    refused(empty(20, 21, 22, 23), "is truncated or damaged", count=False)


def test_animation(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.gif", 20, rate=10, codec="gif", pix_fmt="rgb8")
    assert numbers(path) == list(range(20))
    assert numbers(path, FEW) == [0, 6, 12, 19]


def test_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "none.mp4", "does not exist")
    (tmp_path / "empty.mp4").touch()
    refused(tmp_path / "empty.mp4", r"is empty \(0 bytes\)")
    refused(Path("/dev/null"), "is no regular file")
    (tmp_path / "text.mp4").write_text("This is not a video. " * 500)
    (tmp_path / "zeros.mp4").write_bytes(bytes(10_000))
    (tmp_path / "some.mp4").write_bytes(bytes(range(256)) * 99)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "still.jpg")
    for name in ("text.mp4", "zeros.mp4", "some.mp4", "still.jpg"):
        refused(tmp_path / name, "is not a video of a known kind .*mp4")
    with pytest.raises(UserError, match="is an address: download it first"):
        read_video("http://localhost/clip.mp4", EVERY)
    with pytest.raises(UserError, match="cannot be opened"):
        read_video("x" * 5000, EVERY)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"needs PyAV .*: bash install.sh --extras video"):
        read_video(tmp_path / "text.mp4", EVERY)


def test_files_that_name_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Playlists and lists of files would make FFmpeg open what they name."""
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "clip.ts", 30)
    lists = {
        "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n",
        "list.txt": "ffconcat version 1.0\nfile {}\n",
        "list.sdp": "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    }
    for name, text in lists.items():
        for named in ("clip.ts", "http://127.0.0.1:9/clip.ts", str(tmp_path / "clip.ts")):
            (tmp_path / name).write_text(text.format(named))
            refused(tmp_path / name, "is not a video of a known kind")
    # A name is a name, whatever it looks like.
    for name in ("concat:clip.ts", "pipe:0", "data:clip.ts", "clip%03d.ts", "-"):
        (tmp_path / name).write_bytes((tmp_path / "clip.ts").read_bytes())
        assert numbers(Path(name)) == list(range(30))


@pytest.mark.parametrize("name", ["end.mp4", "first.mp4", "pieces.mp4", "a.mkv", "a.flv", "a.avi"])
def test_truncated_files_never_give_fewer_frames(tmp_path: Path, name: str) -> None:
    flags = {"first.mp4": "faststart", "pieces.mp4": "frag_keyframe+empty_moov"}
    container = {"movflags": flags[name]} if name in flags else {}
    clip = write_video(tmp_path / name, options=KEYS, container=container)
    for share in (0.02, 0.2, 0.5, 0.8):
        cut = cut_file(clip, tmp_path / f"cut_{name}", share)
        refused(cut, "truncated or damaged")
    # Some files can do without their last bytes; then nothing may be missing.
    cut = cut_file(clip, tmp_path / f"cut_{name}", 0.97)
    for config in (EVERY, FEW):
        try:
            found = read_video(cut, config)
        except UserError as error:
            assert "truncated or damaged" in str(error)
        else:
            given = 96 if name != "a.mkv" else len(decode_all(cut))
            assert len(found.frames) == len(sample_indices(given, 24, config))
            assert given > 84  # half a second may be missing at the end of an mkv file


@pytest.mark.parametrize(
    ("codec", "ending"),
    [("libx264", "mp4"), ("mpeg4", "mp4"), ("mpeg4", "avi"), ("libx264", "mkv")],
)
def test_damage_in_the_middle(tmp_path: Path, codec: str, ending: str) -> None:
    def damaged(index: int, data: bytes) -> bytes:
        # From a keyframe on, so that frames between refer to it.
        return data[: len(data) // 4] + b"\x55" * (len(data) * 3 // 4) if 47 < index < 51 else data

    clip = write_video(
        tmp_path / f"clip.{ending}", codec=codec, options={**KEYS, "sc_threshold": "0"}
    )
    path = copy_packets(clip, tmp_path / f"damaged.{ending}", damaged)
    refused(path, "is truncated or damaged", count=False)


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_video(tmp_path / "clip.mp4", 40)
    again = copy_packets(clip, tmp_path / "clip.mkv", lambda _, data: data)
    monkeypatch.setattr(video_frames, "MAX_VIDEO_PIXELS", 4 * 96 * 64)
    assert numbers(clip, FEW) == [0, 13, 26, 39]
    refused(clip, "40 frames of .* lower video.max_frames", count=False)
    folder = tmp_path / "folder"
    folder.mkdir()
    for index, frame in enumerate(read_video(clip, FEW).frames):
        frame.save(folder / f"{index}.png")
    assert numbers(folder) == [0, 13, 26, 39]
    frame.save(folder / "4.png")
    refused(folder, "5 frames of .* lower video.max_frames", count=False)
    monkeypatch.setattr(video_file, "MAX_FRAMES", 39)
    refused(clip, "more than 39 frames")
    refused(again, "more than 39 frames")
    monkeypatch.setattr(video_file, "MAX_PIXELS", 96 * 64 - 1)
    refused(clip, "frames of 96 x 64 pixels, more than the limit of 6143")


def test_size_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that are larger than the header says are held to the same limits."""
    small = write_video(tmp_path / "small.mpg", 30, codec="mpeg2video")
    large = write_video(tmp_path / "large.mpg", 30, codec="mpeg2video", size=(192, 128))
    both = tmp_path / "both.ts"
    for each in (small, large):
        copy_packets(each, each.with_suffix(".ts"), lambda _, data: data)
    both.write_bytes(b"".join(each.with_suffix(".ts").read_bytes() for each in (small, large)))
    sizes = {frame.size for frame in decode_all(both)}
    assert sizes == {(96, 64), (192, 128)}
    with pytest.raises(UserError, match="both.ts .* a frame has 192 x 128 pixels"):
        monkeypatch.setattr(video_frames, "MAX_PIXELS", 96 * 64)
        read_video(both, EVERY)


def test_titles_in_other_encodings(tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4", 5)
    data = clip.read_bytes()
    assert data.count(b"Lavf") == 1
    clip.write_bytes(data.replace(b"Lavf", b"\xb5\xda\xff\xfe"))
    assert numbers(clip) == list(range(5))
    strange = tmp_path / "\u65e0\u9898 #1%20 ?.mp4"
    strange.write_bytes(data)
    assert numbers(strange) == list(range(5))
