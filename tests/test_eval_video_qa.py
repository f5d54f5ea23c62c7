"""Questions on videos: files found, frames answered, predictions for the judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fixtures_eval import whole
from fixtures_tiny import picture, tiny_parts

from llava_uhd.errors import UserError
from llava_uhd.eval.generate import Answerer, Limits
from llava_uhd.eval.provenance import data_digest
from llava_uhd.eval.tasks import TASKS, find_task


def frames(folder: Path) -> None:
    """A video as a folder of frames."""
    folder.mkdir(parents=True)
    for index in range(3):
        picture(40, 30, seed=index).save(folder / f"frame{index}.png")


def small(root: Path, name: str, videos: str, prefix: str = "") -> Path:
    task = find_task(name)
    folder = task.root(root)
    frames(folder / videos / f"{prefix}one")
    frames(folder / videos / f"{prefix}two")
    questions = [
        {"video_name": "one", "question": "what is shown", "question_id": 0},
        {"video_name": "two.mp4", "question": "who runs", "question_id": "v_two_1"},
    ]
    whole(folder / "test_q.json", questions)
    whole(folder / "test_a.json", [
        {"answer": "a dog", "type": 3, "question_id": "v_two_1"},
        {"answer": "cat", "type": 3, "question_id": 0},
    ])  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("name", "videos", "prefix"),
    [
        ("msvd_qa", "videos", ""),
        ("MSRVTT-QA", "videos/all", ""),
        ("activitynet_qa", "all_test", "v_"),
    ],
)
def test_videos_are_answered(name: str, videos: str, prefix: str, tmp_path: Path) -> None:
    folder = small(tmp_path, name, videos, prefix)
    task = find_task(name)
    items = task.load(folder)
    places = [Path(str(item.videos[0])) for item in items]
    assert places == [folder / videos / f"{prefix}{each}" for each in ("one", "two")]
    assert [item.reference for item in items] == ["cat", "a dog"]
    assert task.turns(items[0])[0].text == "<video>\nwhat is shown"
    answerer = Answerer(*tiny_parts(), task, Limits(4, 1, 2))
    frame = answerer.processor.num_video_tokens(3, 40, 30)
    assert frame == 12 and answerer.length(items[0]) == frame + len("<video>\nwhat is shown") // 4
    outcomes = list(answerer.run(items))
    assert not [each for outcome in outcomes for each in outcome.failures]
    found = {each.id: each for outcome in outcomes for each in outcome.answers}
    assert found[0].prompt_tokens > frame
    assert data_digest(task, items) != data_digest(task, items[:1])


def test_predictions_for_the_judge(tmp_path: Path) -> None:
    folder = small(tmp_path, "msvd_qa", "videos")
    task = TASKS.get("msvd_qa")
    items = task.load(folder)
    ((name, content),) = task.submission(folder, items, {0: "a cat", "v_two_1": "Dog."})
    assert name == "msvd_qa_predictions.jsonl"
    assert [json.loads(line) for line in content.splitlines()] == [
        {"id": 0, "question": "what is shown", "answer": "cat", "pred": "a cat"},
        {"id": "v_two_1", "question": "who runs", "answer": "a dog", "pred": "Dog."},
    ]
    file = tmp_path / name
    file.write_bytes(content)
    task.check_submission(folder, file)
    assert task.read_published(folder, file) == {0: "a cat", "v_two_1": "Dog."}
    assert [task.score(item, text)["exact_match"] for item, text in
            zip(items, ("a cat", "cat"), strict=True)] == [1, 0]  # fmt: skip
    file.write_bytes(content.splitlines()[0] + b"\n")
    with pytest.raises(UserError, match="1 questions are missing, 0 foreign"):
        task.check_submission(folder, file)
    whole(folder / "test_a.json", [{"answer": "x", "question_id": 0}])
    with pytest.raises(UserError, match="has no answer to question 'v_two_1'"):
        task.load(folder)
    with pytest.raises(UserError, match="videos is missing; get the clips of MSVD"):
        (folder / "videos").rename(folder / "gone")
        task.load(folder)
