"""The published files themselves: lines of answers, what judges read, folders and names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fixtures_eval import answers_file, lines, make_textvqa, scored, submitted, whole

from llava_uhd.errors import UserError
from llava_uhd.eval import published
from llava_uhd.eval.tasks import TASKS, find_task
from llava_uhd.eval.tasks.question_file import image_path

ANSWERS = {
    "vqav2": "vqav2/answers/llava_vqav2_mscoco_test-dev2015/toy-model/merge.jsonl",
    "gqa": "gqa/answers/llava_gqa_testdev_balanced/toy-model/merge.jsonl",
    "vizwiz": "vizwiz/answers/toy-model.jsonl",
    "textvqa": "textvqa/answers/toy-model.jsonl",
    "pope": "pope/answers/toy-model.jsonl",
    "mme": "MME/answers/toy-model.jsonl",
    "scienceqa": "scienceqa/answers/toy-model.jsonl",
    "mmbench": "mmbench/answers/mmbench_dev_20230712/toy-model.jsonl",
    "mmbench_cn": "mmbench_cn/answers/mmbench_dev_cn_20231003/toy-model.jsonl",
    "seed_bench": "seed_bench/answers/toy-model/merge.jsonl",
    "llava_bench": "llava-bench-in-the-wild/answers/toy-model.jsonl",
    "mmvet": "mm-vet/answers/toy-model.jsonl",
}


@pytest.mark.parametrize("name", ANSWERS)
def test_lines_of_answers_are_the_published_ones(golden: Path, name: str) -> None:
    """Ids with their types, prompts and the order of keys: all but the random id of the answer."""
    root, task = golden / "evaluation", TASKS.get(name)
    folder, file = task.root(root), root / ANSWERS[name]
    answers = task.read_published(folder, file)
    items = {item.id: item for item in task.items(folder)}
    wanted = []
    for line in file.read_text("utf-8").splitlines():
        try:
            wanted.append(json.loads(line))
        except ValueError:
            assert name == "vqav2"  # its last line is cut off
    assert len(wanted) == len(answers) > 20
    for row, (key, text) in zip(wanted, answers.items()):
        ours = task.published_row(items[key], text, "toy-model")
        assert list(ours) == list(row)
        assert len(ours.pop("answer_id")) == 22
        row.pop("answer_id")
        assert published.json_lines([ours]) == published.json_lines([row])


def test_mm_vet_result_file_is_the_published_one(golden: Path) -> None:
    folder = golden / "evaluation/mm-vet"
    wanted = folder / "results/toy-model.json"
    files = submitted("mmvet", folder.parent, folder / "answers/toy-model.jsonl")
    assert files == {"mm-vet.json": wanted.read_bytes()}
    TASKS.get("mmvet").check_submission(folder, wanted)


def test_judged_tasks_on_small_files(tmp_path: Path) -> None:
    rows = [
        {"question_id": n, "image": "a.jpg", "text": "Q?", "category": "conv"} for n in range(2)
    ]
    folder = tmp_path / "mm-vet"
    lines(folder / "llava-mm-vet.jsonl", rows)
    task = TASKS.get("mmvet")
    message = task.missing(folder)
    assert message and str(folder / "images") in message and "mm-vet.zip" in message
    file = answers_file(tmp_path / "a.jsonl", {0: "é", 1: "y"})
    upload = tmp_path / "r.json"
    upload.write_bytes(submitted("mm-vet", tmp_path, file)["mm-vet.json"])
    assert upload.read_text() == '{\n  "v1_0": "\\u00e9",\n  "v1_1": "y"\n}'
    task.check_submission(folder, upload)
    with pytest.raises(UserError, match="1 questions are missing, 1 are foreign"):
        task.check_submission(folder, whole(upload, {"v1_0": "x", "1": "y"}))
    with pytest.raises(UserError, match="no score without its server or a judge"):
        scored("mmvet", tmp_path, file)
    wild = tmp_path / "llava-bench-in-the-wild"
    lines(wild / "questions.jsonl", rows)
    message = find_task("llava-bench-in-the-wild").missing(wild)
    assert message and "(and 2 more) is missing" in message and "context.jsonl" in message
    items = list(TASKS.get("llava_bench").items(wild))
    assert items[0].groups == {"category": "conv"} and items[0].images == (wild / "images/a.jpg",)


def test_ids_of_answers() -> None:
    first = published.answer_id("m", 1, "p")
    assert len(first) == 22 and first == published.answer_id("m", 1, "p")
    assert first != published.answer_id("m", "1", "p")
    assert not set(first) & set("01lIO")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question_id": 1, "text": "a"}\n{"question_id', "line 2 is not valid JSON"),
        ('{"question_id": 1}', "record 0: has no field 'text'"),
        ("[3]", "record 0: must be an object, got int"),
        ('{"question_id": 1.5, "text": "a"}', "1.5 must be a text or a whole number"),
        ('{"question_id": 1, "text": null}', "answer to 1 must be a text, got NoneType"),
        ('{"question_id": 1, "text": ""}\n' * 2, "1 is answered twice"),
    ],
)
def test_damaged_answers(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        published.read_answers(file)
    assert str(file) in str(caught.value)


def test_answers_of_other_kinds_are_told(tmp_path: Path) -> None:
    make_textvqa(tmp_path)
    file = lines(tmp_path / "a.jsonl", [{"question_id": "a", "prompt": 5, "text": "x"}])
    with pytest.raises(UserError, match=r"a\.jsonl: not in the published form \(AttributeError"):
        scored("textvqa", tmp_path, file)


@pytest.mark.parametrize("name", ["../a.jpg", "/a.jpg", "C:\\a.jpg", "a/../../b", "", None, "a\0"])
def test_images_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="must stay inside"):
        image_path(tmp_path, name, tmp_path / "q.jsonl")
    assert image_path(tmp_path, "a/b.jpg", tmp_path) == tmp_path / "a/b.jpg"


def test_names_of_tasks(root: Path) -> None:
    assert find_task("SQA") is TASKS.get("scienceqa") and find_task("MME") is TASKS.get("mme")
    scripts = [path.stem for path in (root / "scripts/v1_5/eval/4stage").glob("*.sh")]
    assert len(scripts) == 12
    for name in [*scripts, "docvqa_val", "mmbench_dev_cn_20231003", "LLaVA-Bench-in-the-Wild"]:
        assert find_task(name).name in TASKS.names()
    with pytest.raises(UserError, match="unknown task 'gqaa'; did you mean 'gqa'"):
        find_task("gqaa")
