"""Videos to frames: the rule of choosing, files of many kinds against decoding everything."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
from fixtures_video import decode_all, number, picture, write_video
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava_uhd.config.model import VideoConfig
from llava_uhd.errors import UserError
from llava_uhd.images import video_frames
from llava_uhd.images.video import (
    Video,
    frame_size,
    num_frames,
    read_video,
    sample_indices,
    time_instruction,
)
from llava_uhd.images.video_file import Timeline, VideoFile

CONFIGS = (
    VideoConfig(),
    VideoConfig(fps=2.5),
    VideoConfig(fps=0.1),
    VideoConfig(fps=24, max_frames=0),
    VideoConfig(max_frames=3),
    VideoConfig(fps=12, max_frames=7),
    VideoConfig(max_frames=5, force_sample=True),
    VideoConfig(max_frames=1, force_sample=True),
    VideoConfig(max_frames=130, force_sample=True),
)
B_FRAMES = {"g": "12", "bf": "3", "x264-params": "scenecut=0"}
OPEN_GOP = {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0:b-pyramid=normal"}
KINDS = {
    "clip.mp4": {},
    "keys.mp4": {"options": B_FRAMES},
    "open.mp4": {"options": OPEN_GOP},
    "refresh.mp4": {"options": {"g": "999", "x264-params": "intra-refresh=1"}},
    "all_keys.mov": {"options": {"g": "1", "bf": "0"}},
    "first.mp4": {"options": B_FRAMES, "container": {"movflags": "faststart"}},
    "pieces.mp4": {"options": B_FRAMES, "container": {"movflags": "frag_keyframe+empty_moov"}},
    "keys.mkv": {"options": B_FRAMES},
    "open.ts": {"options": OPEN_GOP},
    "keys.flv": {"options": B_FRAMES},
    "keys.avi": {"options": B_FRAMES},
    "part2.mp4": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "part2.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "24", "deadline": "realtime"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "24", "deadline": "realtime"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a video of 4 seconds of each kind, 96 frames."""
    folder = tmp_path_factory.mktemp("clips")
    for name, values in KINDS.items():
        write_video(folder / name, **values)
    return folder


def published_indices(total: int, fps: float, config: VideoConfig) -> list[int]:
    """The published rule, as it was written; its step of 0 is an error."""
    step = round(fps / config.fps)
    indices = [index for index in range(0, total, step)]
    if config.max_frames > 0 and (len(indices) > config.max_frames or config.force_sample):
        indices = np.linspace(0, total - 1, config.max_frames, dtype=int).tolist()
    return indices


def test_sample_indices_examples() -> None:
    assert sample_indices(250, 25, VideoConfig()) == list(range(0, 226, 25))
    assert sample_indices(250, 25, VideoConfig(max_frames=4)) == [0, 83, 166, 249]
    assert sample_indices(250, 25, VideoConfig(fps=2)) == list(range(0, 241, 12))
    forced = sample_indices(250, 25, VideoConfig(max_frames=500, force_sample=True))
    assert len(forced) == 500 and set(forced) == set(range(250))
    assert sample_indices(100, 0.4, VideoConfig(max_frames=0)) == list(range(100))
    assert sample_indices(1, 25, VideoConfig(max_frames=3, force_sample=True)) == [0, 0, 0]
    assert sample_indices(3, 25, VideoConfig(fps=1e-300)) == [0]
    # 11 * 45 / 33 is 15, numpy's arithmetic falls just short of it.
    found = sample_indices(46, 46, VideoConfig(fps=46, max_frames=34))
    assert (found[11], 11 * 45 // 33) == (14, 15)
    for total, fps in ((0, 25), (10, 0), (10, float("nan")), (10, float("inf"))):
        with pytest.raises(ValueError, match="a video of"):
            sample_indices(total, fps, VideoConfig())


@given(
    total=st.integers(1, 5000),
    fps=st.sampled_from([0.5, 1, 7.5, 15, 23.976, 24, 25, 29.97, 30, 59.94, 60]),
    wanted=st.sampled_from([0.25, 0.5, 1, 2, 3.7]),
    bound=st.integers(0, 70),
    force=st.booleans(),
)
def test_sample_indices_as_published(
    total: int, fps: float, wanted: float, bound: int, force: bool
) -> None:
    config = VideoConfig(fps=wanted, max_frames=bound, force_sample=force and bound > 0)
    found = sample_indices(total, fps, config)
    if round(fps / wanted) > 0:
        assert found == published_indices(total, fps, config)
    assert found == sorted(found) and found[0] == 0 and found[-1] < total


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_what_decoding_everything_gives(clips: Path, name: str) -> None:
    path = clips / name
    everything = decode_all(path)
    assert len(everything) == 96
    for config in CONFIGS:
        expected = published_indices(96, 24, config)
        video = read_video(path, config)
        assert num_frames(path, config) == len(expected) == len(video.frames) == len(video.times)
        assert [number(frame) for frame in video.frames] == expected
        for frame, index in zip(video.frames, expected, strict=True):
            assert frame.mode == "RGB" and frame.tobytes() == everything[index].tobytes()
        assert np.abs(np.subtract(video.times, np.divide(expected, 24))).max() < 6e-4
        assert video.duration == pytest.approx(4, abs=1.1e-3)
    assert frame_size(str(path)) == (96, 64)


def test_rate_that_varies(tmp_path: Path) -> None:
    steps = np.random.default_rng(0).integers(10, 300, 59)
    shown = [0, *np.cumsum(steps).tolist()]
    rate = 60 / (shown[-1] / 1000)
    for ending in ("mp4", "mkv"):
        path = write_video(
            tmp_path / f"clip.{ending}", 60, milliseconds=shown, options={"g": "12", "bf": "2"}
        )
        everything = decode_all(path)
        for config in CONFIGS:
            video = read_video(path, config)
            expected = published_indices(60, rate, config) if config.fps < 24 else range(60)
            assert [number(frame) for frame in video.frames] == list(expected)
            assert num_frames(path, config) == len(expected)
            assert video.times == pytest.approx([shown[index] / 1000 for index in expected])
            assert 0 < video.duration - shown[-1] / 1000 < 0.3
            for frame, index in zip(video.frames, expected, strict=True):
                assert frame.tobytes() == everything[index].tobytes()


def test_few_frames_need_few_decoded(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = video_frames._decode

    def counting(*words: object) -> object:
        for each in decode(*words):  # type: ignore[arg-type]
            decoded.append(each[0].pts)
            yield each

    monkeypatch.setattr(video_frames, "_decode", counting)
    config = VideoConfig(max_frames=2, force_sample=True)
    assert [number(each) for each in read_video(clips / "keys.mp4", config).frames] == [0, 95]
    assert len(decoded) < 20
    # Without jumps everything is decoded, and nothing else changes.
    few = read_video(clips / "keys.mp4", CONFIGS[5])
    monkeypatch.setattr(video_frames._Reader, "_from_key", missed)
    decoded.clear()
    all_of_them = read_video(clips / "keys.mp4", CONFIGS[5])
    assert len(decoded) >= 95
    assert [a.tobytes() for a in few.frames] == [b.tobytes() for b in all_of_them.frames]
    assert few.times == all_of_them.times


def missed(*words: object) -> None:
    """A jump that finds nothing."""
    raise video_frames._MissedError


def test_group_by_key_example() -> None:
    timeline = Timeline(120, list(range(120)), [(0, 0), (30, 28), (60, 58), (90, 88)], 1)
    groups = video_frames.group_by_key(timeline, [5, 29, 31, 80])
    assert groups == [((0, 0), [5, 29, 31]), ((60, 58), [80])]
    # Every frame comes after its key, in one group, and no key with work to save is passed by.
    rng = random.Random(0)
    for _ in range(200):
        wanted = sorted(rng.sample(range(120), rng.randint(1, 20)))
        groups = video_frames.group_by_key(timeline, wanted)
        assert [stamp for _, group in groups for stamp in group] == wanted
        for (key, _), group in groups:
            last = key
            for stamp in group:
                between = [each for each, _ in timeline.keys if last < each <= stamp]
                assert stamp >= key and not any(b - last >= 8 for b in between if b > group[0])
                last = stamp


def test_counting_decodes_nothing(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_frames, "_decode", None)
    assert num_frames(clips / "keys.mkv", VideoConfig()) == 4
    # The header of an mp4 file tells: its packets are not even read.
    monkeypatch.setattr(VideoFile, "packets", None)
    assert num_frames(clips / "keys.mp4", VideoConfig()) == 4
    with pytest.raises(TypeError):
        num_frames(clips / "keys.mkv", VideoConfig())


def write_folder(folder: Path, count: int) -> Path:
    """A folder of frames whose names are not padded with zeros, and what else lies in folders."""
    folder.mkdir()
    for index in range(count):
        Image.fromarray(picture(index)).save(folder / f"frame{index}.{('png', 'BMP')[index % 2]}")
    (folder / "Thumbs.db").write_bytes(b"none")
    (folder / "._frame0.png").write_bytes(b"none")
    (folder / "times.json").write_text("{}")
    (folder / "folder.png").mkdir()
    return folder


def test_folder_of_frames(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "clip", 23)
    for config in CONFIGS:
        bounded = 0 < config.max_frames < 23 or config.force_sample
        expected = list(range(23))
        if bounded:
            expected = np.linspace(0, 22, config.max_frames, dtype=int).tolist()
        video = read_video(folder, config)
        assert [number(frame) for frame in video.frames] == expected
        assert video.times == [index / 2 for index in expected] and video.duration == 11.5
        assert num_frames(folder, config) == len(expected)
    assert frame_size(folder) == (96, 64)
    # The published rule for folders takes ten, repeated ones where there are fewer.
    ten = VideoConfig(max_frames=10, force_sample=True)
    few = read_video(write_folder(tmp_path / "few", 4), ten)
    assert [number(frame) for frame in few.frames] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    (folder / "frame7.BMP").write_bytes(b"BM damaged")
    with pytest.raises(UserError, match="frame7.BMP"):
        read_video(folder, VideoConfig())
    (tmp_path / "none").mkdir()
    for ask in (lambda path: read_video(path, ten), lambda path: num_frames(path, ten), frame_size):
        with pytest.raises(UserError, match="none has no pictures: .*folder of frames"):
            ask(tmp_path / "none")


def test_list_of_pictures() -> None:
    images = [Image.fromarray(picture(index)) for index in range(6)]
    video = read_video(images, VideoConfig())
    assert [number(frame) for frame in video.frames] == list(range(6))
    assert video.times == [0, 0.5, 1, 1.5, 2, 2.5] and video.duration == 3
    grey = tuple(image.convert("L") for image in images)
    video = read_video(grey, VideoConfig(max_frames=3))
    assert [(number(each), each.mode) for each in video.frames] == [
        (0, "RGB"),
        (2, "RGB"),
        (5, "RGB"),
    ]
    assert num_frames(grey, VideoConfig(max_frames=3)) == 3
    assert frame_size(grey) == (96, 64)
    with pytest.raises(UserError, match="the list is empty"):
        read_video([], VideoConfig())
    with pytest.raises(UserError, match="frame 1 of a video must be a PIL image, got str"):
        read_video([images[0], "a.png"], VideoConfig())  # type: ignore[list-item]
    for wrong in (7, None, iter(images), np.zeros((2, 4, 4, 3))):
        with pytest.raises(UserError, match="must be a path, a list of PIL images or a Video"):
            read_video(wrong, VideoConfig())  # type: ignore[arg-type]


def test_video_passes_through(clips: Path) -> None:
    video = read_video(clips / "clip.mp4", VideoConfig(fps=4))
    few = VideoConfig(max_frames=2)
    assert read_video(video, few) is video
    assert num_frames(video, few) == 16 and frame_size(video) == (96, 64)


def test_time_instruction(clips: Path) -> None:
    video = read_video(clips / "clip.mp4", VideoConfig(fps=2, max_frames=3))
    assert time_instruction(video) == (
        "The video lasts for 4.00 seconds, and 3 frames are uniformly sampled from it. These "
        "frames are located at 0.00s,1.96s,3.96s.Please answer the following questions related to "
        "this video."
    )
    one = Video(video.frames[:1], [0.0], 0.0411)
    assert "lasts for 0.04 seconds, and 1 frames are" in time_instruction(one)


def test_repeated_frames_are_one_object(clips: Path) -> None:
    forced = dataclasses.replace(VideoConfig(), max_frames=192, force_sample=True)
    video = read_video(clips / "clip.mp4", forced)
    assert len(video.frames) == 192 and len({id(frame) for frame in video.frames}) == 96
