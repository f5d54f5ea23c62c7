"""Chat about several images and videos, through the engine and in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fixtures_model import call, save_tiny
from fixtures_tiny import picture, tiny_parts
from fixtures_video import write_video
from test_mixed_visuals import MODELS

from llava_uhd.errors import UserError
from llava_uhd.images.video import Video
from llava_uhd.serve.chat import ChatEngine, Conversation, Sampling

GREEDY = Sampling(temperature=0, max_new_tokens=5)


def onevision(**video: Any) -> dict[str, Any]:
    options = {key: dict(value) for key, value in MODELS["onevision"].items()}
    options["video"] |= video
    return options


@pytest.fixture(scope="module")
def engine() -> ChatEngine:
    return ChatEngine(*tiny_parts(seed=5, **onevision()))


def frames(count: int, seed: int = 0) -> list[Any]:
    return [picture(40, 24, seed + index) for index in range(count)]


def test_images_and_a_video_over_two_turns(engine: ChatEngine) -> None:
    """Each answer is that of ``generate`` on the whole conversation so far."""
    talk = Conversation()
    talk.add_image(picture(60, 30))
    talk.add_image(picture(30, 60, 1))
    first = engine.reply(talk, "Which is wider?", GREEDY)
    talk.add_video(frames(3), engine.processor.video_config)
    second = engine.reply(talk, "And the video?", GREEDY)
    assert [turn.text.count("<image>") for turn in talk.turns] == [2, 0, 0, 0]
    assert [turn.text.count("<video>") for turn in talk.turns] == [0, 0, 1, 0]
    assert not talk.pending and not talk.pending_videos
    assert len(talk.images) == 2 and len(talk.videos) == 1
    again = engine.encode(talk.turns[:3], talk.images, talk.videos)
    assert "".join(engine.generate(again, GREEDY)).strip() == second
    alone = engine.encode(talk.turns[:1], talk.images)
    assert "".join(engine.generate(alone, GREEDY)).strip() == first


def test_markers_of_the_user_decide_the_place() -> None:
    talk = Conversation()
    talk.add_image(picture(9, 9))
    talk.pending_videos.append(Video(frames(2), [0.0, 1.0], 2.0))
    assert talk.question("What?").text == "<image>\n<video>\nWhat?"
    assert talk.question("<video> shows <image>?").text == "<video> shows <image>?"
    with pytest.raises(UserError, match="has 2 <video> but 1 videos wait"):
        talk.question("<video> <video> <image>")
    talk.clear()
    assert not talk.pending_videos
    assert talk.question("What is a <video> tag?").text == "What is a <video> tag?"


def test_times_are_told_where_the_model_was_trained_so() -> None:
    engine = ChatEngine(*tiny_parts(seed=5, **onevision(time_instruction=True)))
    talk = Conversation()
    talk.pending_videos.append(Video(frames(2), [0.0, 1.0], 2.0))
    engine.reply(talk, "What?", GREEDY)
    assert talk.turns[0].text.startswith("<video>\nThe video lasts for 2.00 seconds, and 2 frames")
    assert "located at 0.00s,1.00s." in talk.turns[0].text


def test_in_the_terminal(tmp_path: Path) -> None:
    """Several images and a folder of frames, at the start and in between."""
    folder = save_tiny(tmp_path / "model", seed=5, **onevision())
    clip = tmp_path / "clip"
    clip.mkdir()
    for index, frame in enumerate(frames(4)):
        frame.save(clip / f"{index}.png")
    for name in ("a.png", "b.png"):
        picture(50, 30).save(tmp_path / name)
    options = ("--model-path", folder, "--temperature", "0", "--max-new-tokens", "4")
    shown = ("--image-file", "a.png", "--image-file", "b.png", "--video-file", "clip")
    lines = "Which?\n/video clip\nAnd this?\n/video\n/video missing.mp4\nStill there?\n"
    status, out, error = call("llava_uhd.serve.cli", *options, *shown, cwd=tmp_path, text=lines)
    assert len(out.splitlines()) == 3, error
    assert status == 2, "two lines were refused"
    assert "/video needs a path" in error and "missing.mp4" in error
    status, _, error = call(
        "llava_uhd.serve.cli", *options, "--video-file", "none.mp4", cwd=tmp_path, text="Hi\n"
    )
    assert status == 2 and "--video-file none.mp4 does not exist" in error


def test_a_film_is_read_sampled_and_answered(tmp_path: Path) -> None:
    """Four seconds at 8 frames per second: four frames, and the answer of those frames."""
    film = write_video(tmp_path / "clip.mp4", 32, 8)
    engine = ChatEngine(*tiny_parts(seed=5, **onevision()))
    talk = Conversation()
    video = talk.add_video(film, engine.processor.video_config)
    assert [round(time, 3) for time in video.times] == [0, 1, 2, 3]
    answer = engine.reply(talk, "What happens?", GREEDY)
    inputs = engine.processor(text="<video>", videos=[film])
    assert inputs["view_grids"].shape[0] == 4
    shown = Conversation()
    shown.add_video(list(video.frames), engine.processor.video_config)
    assert engine.reply(shown, "What happens?", GREEDY) == answer

    cut = tmp_path / "cut.mp4"
    cut.write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    with pytest.raises(UserError, match="cut.mp4"):
        talk.add_video(cut, engine.processor.video_config)
    folder = save_tiny(tmp_path / "model", seed=5, **onevision())
    options = ("--model-path", folder, "--temperature", "0", "--max-new-tokens", "4")
    status, out, error = call(
        "llava_uhd.serve.cli", *options, "--video-file", "clip.mp4", cwd=tmp_path, text="What?\n"
    )
    assert status == 0 and len(out.splitlines()) == 1, error
    status, out, error = call(
        "llava_uhd.serve.cli", *options, "--video-file", "cut.mp4", cwd=tmp_path, text="What?\n"
    )
    assert status == 2 and not out and len(error.strip().splitlines()) == 1, error
    assert "cut.mp4" in error
