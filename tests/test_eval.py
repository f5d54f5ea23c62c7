"""Evaluation in one process: scores, batches, failing items, tables."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures_tiny import picture, tiny_parts
from PIL import Image

from llava_uhd.errors import UserError
from llava_uhd.eval import metrics
from llava_uhd.eval.__main__ import main
from llava_uhd.eval.answers import AnswerLog
from llava_uhd.eval.choose import choose_tasks
from llava_uhd.eval.generate import Answerer, Limits, count_new
from llava_uhd.eval.provenance import data_digest, model_digest
from llava_uhd.eval.ranks import Ranks
from llava_uhd.eval.results import check_ids, collect, markdown
from llava_uhd.eval.task import Item, Task
from llava_uhd.eval.tasks import TASKS
from llava_uhd.text.templates import Turn


class Mixed(Task):
    """Questions with none, one and two images of many shapes."""

    name, title, folder, source, main_metric = "mixed", "Mixed", "mixed", "made here", "exact"

    def files(self, root: Path) -> list[Path]:
        return [root]

    def items(self, root: Path) -> Iterator[Item]:
        sizes = [(40, 30), (96, 64), (30, 130), (64, 64), (150, 60), (33, 20), (70, 90), (20, 20)]
        for index in range(14):
            images = tuple(
                picture(*sizes[(index + k) % len(sizes)], seed=index * 7 + k)
                for k in range((1, 0, 2)[index % 3])
            )
            history = (Turn("human", "Who?"), Turn("gpt", "red")) if index % 5 == 4 else ()
            yield Item(index, "What " * (index % 4 + 1), images, "x", history)

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        return {"exact": metrics.exact_match(parsed, item.reference)}


@pytest.fixture(scope="module")
def tiny() -> Any:
    model, processor = tiny_parts()
    # Many end tokens, so that answers differ in length.
    model.generation_config.eos_token_id = list(range(2, len(processor.tokenizer), 7))
    return model, processor


def answers(tiny: Any, task: Task, items: list[Item], batch_size: int, beams: int = 1) -> Any:
    answerer = Answerer(*tiny, task, Limits(12, beams, batch_size))
    outcomes = list(answerer.run(items))
    failures = [each for outcome in outcomes for each in outcome.failures]
    return {each.id: each for outcome in outcomes for each in outcome.answers}, failures


@pytest.mark.parametrize("beams", [1, 3])
def test_batches_do_not_change_answers(tiny: Any, beams: int, tmp_path: Path) -> None:
    task = Mixed()
    items = task.load(tmp_path)
    single, _ = answers(tiny, task, items, 1, beams)
    batched, failures = answers(tiny, task, items[::-1], 4, beams)
    assert not failures
    assert batched == single and len(single) == 14
    assert len({each.text for each in single.values()}) > 7
    assert len({each.new_tokens for each in single.values()}) > 2


def test_prompts_are_those_of_training(tiny: Any, tmp_path: Path) -> None:
    task = Mixed()
    items = task.load(tmp_path)
    got, _ = answers(tiny, task, [items[2], items[4]], 2)
    assert got[2].prompt.endswith("answers to the user's questions. USER: <image>\n<image>\n"
                                  "What What What  ASSISTANT:")  # fmt: skip
    assert "USER: Who? ASSISTANT: red</s>USER: What  ASSISTANT:" in got[4].prompt


def test_one_bad_item_does_not_take_others_along(tiny: Any, tmp_path: Path) -> None:
    task = Mixed()
    items = task.load(tmp_path)[:6]
    bad = [Item("gone", "What", (tmp_path / "no.png",)), Item("long", "What " * 3000)]
    expected, _ = answers(tiny, task, items, 1)
    got, failures = answers(tiny, task, [items[0], bad[0], *items[1:], bad[1]], 4)
    assert got == expected
    reasons = {each.id: each.reason for each in failures}
    assert reasons["gone"] == f"image {tmp_path / 'no.png'} does not exist"
    assert "the model takes 2048" in reasons["long"]


def test_a_batch_that_fails_is_answered_one_by_one(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Mixed()
    items = task.load(tmp_path)[:4]
    expected, _ = answers(tiny, task, items, 1)
    generate = type(tiny[0]).generate

    def weak(self: Any, input_ids: Any = None, **inputs: Any) -> Any:
        if len(input_ids) > 1 or (input_ids == input_ids[0, -1]).sum() > 99:
            raise MemoryError("too large")
        return generate(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(type(tiny[0]), "generate", weak)
    got, failures = answers(tiny, task, items, 4)
    assert got == expected and not failures


@pytest.mark.parametrize(
    ("row", "expected"), [([5, 6, 2, 0], 3), ([5, 0, 0], 1), ([5, 6], 2), ([0], 0), ([2, 2], 1)]
)
def test_count_new(row: list[int], expected: int) -> None:
    assert count_new(row, {2}, 0) == expected


def test_metrics() -> None:
    assert metrics.exact_match(" 12\n", "12") == 1 and metrics.exact_match("012", "12") == 0
    assert metrics.place_accuracy("1294", "123") == 2 / 3
    assert metrics.place_accuracy("", "123") == 0
    assert metrics.standard_error([0, 1, 1, 0]) == pytest.approx((1 / 3) ** 0.5 / 2)
    assert metrics.standard_error([1]) == 0
    assert metrics.mean_of_each([{"a": 1, "b": 0}, {"a": 0}]) == {"a": 0.5, "b": 0.0}
    assert metrics.grouped([1, 2, 3], lambda x: None if x == 2 else "odd") == {"odd": [1, 3]}
    for call in (lambda: metrics.mean([]), lambda: metrics.place_accuracy("1", "")):
        with pytest.raises(ValueError):
            call()


def test_shares_are_a_partition() -> None:
    for size in (1, 2, 3, 5):
        shares = [Ranks(rank, size).share(range(4)) for rank in range(size)]
        assert sorted(item for share in shares for item in share) == [0, 1, 2, 3]
    assert Ranks.from_environment({"RANK": "1", "WORLD_SIZE": "2"}) == Ranks(1, 2, 0)
    assert Ranks.from_environment({}) == Ranks(0, 1, 0)
    for wrong in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x"}, {"WORLD_SIZE": "0"}):
        with pytest.raises(UserError, match="no process of a launch"):
            Ranks.from_environment(wrong)


def test_ids_are_checked() -> None:
    items = [Item(each, "q") for each in ("a", "b", "c")]
    assert check_ids(items[:2], items, {"a": 0, "b": 0, "c": 0}) == ""
    assert "2 of 3 items have no answer ('b', 'c')" in check_ids(items, items, {"a": 0})
    assert "1 answers belong to no item (7)" in check_ids(items[:1], items, {"a": 0, 7: 0})
    assert check_ids([Item(1, "q")], [Item(1, "q")], {"1": 0})  # the type of an id counts


def run(checkpoint: Path, data: Path, output: Path, *more: str) -> int:
    words = [str(checkpoint), "--data-root", str(data), "--output", str(output), *more]
    return main(["run", *words, "--device", "cpu"])


def test_run_and_score_again(
    tiny_checkpoint: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(tiny_checkpoint, questions, out) == 0
    folder = out / "synthetic"
    result = json.loads((out / "results.json").read_text())["tasks"]["synthetic"]
    assert set(result["scores"]) == {"sign_exact", "digit_accuracy", "mark_exact"}
    assert (result["items"], result["counts"]["sign_exact"]) == (8, 4)
    assert set(result["breakdown"]) == {"question", "size", "sign and slice borders"}
    rows = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    asked = [json.loads(line) for line in (questions / "eval.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [row["question_id"] for row in asked]
    assert [row["reference"] for row in rows] == [row["answer"] for row in asked]
    for name in ("results.md", "results.csv"):
        assert "sign_exact" in (out / name).read_text()
    lines = list(csv.DictReader((out / "results.csv").open()))
    assert [line["items"] for line in lines] == ["4", "4", "4"]
    assert json.loads((folder / "run.json").read_text())["versions"]["torch"]
    saved = (folder / "answers.jsonl").read_bytes()
    log = (folder / "log.rank0.jsonl").read_bytes()

    assert run(tiny_checkpoint, questions, out, "--batch-size", "3") == 0  # nothing left to do
    assert "0 of 8 items to do" in capsys.readouterr().err
    assert (folder / "log.rank0.jsonl").read_bytes() == log

    right = [json.loads(line) for line in saved.splitlines()]
    for row, reference in zip(right, asked, strict=True):
        row["text"] = reference["answer"]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in right))
    assert main(["score", str(out)]) == 0
    assert set(collect(out)[0].scores.values()) == {1.0}
    (folder / "answers.jsonl").write_bytes(saved.split(b"\n", 1)[1])
    assert main(["score", str(out)]) == 1
    assert "1 of 8 items have no answer" in (out / "results.md").read_text()


def test_settings_protect_answers(tiny_checkpoint: Path, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(tiny_checkpoint, questions, out, "--limit", "2") == 0
    assert "first 2 of 8 only: not comparable" in (out / "results.md").read_text()
    with pytest.raises(UserError, match=r"beams was 1, is 2"):
        run(tiny_checkpoint, questions, out, "--beams", "2")
    copy = tmp_path / "data"
    shutil.copytree(questions, copy)
    text = (copy / "eval.jsonl").read_text().replace("What does", "Tell what")
    (copy / "eval.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"\(questions was \w+, is \w+\)"):
        run(tiny_checkpoint, copy, out)
    assert run(tiny_checkpoint, copy, out, "--overwrite") == 0
    assert collect(out)[0].items == 8


def test_answers_are_read_behind_the_lock(
    tiny_checkpoint: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that outlived its launcher writes until the lock is free: nothing is done twice."""
    assert run(tiny_checkpoint, questions, tmp_path / "whole") == 0
    out = tmp_path / "out"
    assert run(tiny_checkpoint, questions, out, "--limit", "2") == 0
    log = out / "synthetic/log.rank0.jsonl"
    whole = (tmp_path / "whole/synthetic/log.rank0.jsonl").read_bytes()
    enter = AnswerLog.__enter__

    def late(self: AnswerLog) -> AnswerLog:
        log.write_bytes(whole)
        return enter(self)

    monkeypatch.setattr(AnswerLog, "__enter__", late)
    assert run(tiny_checkpoint, questions, out) == 0
    assert log.read_bytes() == whole


def test_failing_item_gives_no_score(
    tiny_checkpoint: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(questions, data)
    broken = data / "images/eval/000002.png"
    whole = broken.read_bytes()
    # As long as before: the size of the file is part of the settings.
    broken.write_bytes(b"\0" * len(whole))
    assert run(tiny_checkpoint, data, out) == 1
    assert "000002.png" in capsys.readouterr().err
    result = collect(out)[0]
    assert not result.scores and "2 of 8 items have no answer" in result.problem
    failures = (out / "synthetic/failures.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in failures} == {"2-sign", "2-colour"}
    assert len((out / "synthetic/answers.jsonl").read_text().splitlines()) == 6
    broken.write_bytes(whole)
    assert run(tiny_checkpoint, data, out) == 0
    assert collect(out)[0].items == 8
    assert not (out / "synthetic/failures.jsonl").exists()


def test_choosing_tasks(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    console = Console(stderr=True)
    assert [task.name for task in choose_tasks(None, questions, console)] == ["synthetic"]
    told = capsys.readouterr().err  # one line names all others, and the command that says more
    count = len(TASKS.names())
    assert told.count("\n") == 1 and told.startswith(f"{count - 1} of {count} tasks are left out")
    assert all(name in told for name in TASKS.names() if name != "synthetic")
    assert f"python -m llava_uhd.eval check-data --data-root {questions}" in told
    with pytest.raises(UserError, match="did you mean 'synthetic'"):
        choose_tasks("synthetik", questions, console)
    for names in (None, "synthetic"):
        with pytest.raises(UserError) as caught:
            choose_tasks(names, tmp_path, console)
        assert f"{tmp_path}/synthetic/eval.jsonl" in str(caught.value)
        assert "python -m llava_uhd.data.synthetic" in str(caught.value)
        assert len(str(caught.value)) < 1000
    with pytest.raises(UserError, match="names no task"):
        choose_tasks(" , ", questions, console)


@pytest.mark.parametrize("words", [["--limit", "0"], ["--batch-size", "0"], ["--beams", "0"]])
def test_impossible_numbers(tiny_checkpoint: Path, questions: Path, words: list[str]) -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        run(tiny_checkpoint, questions, questions / "never", *words)


@pytest.mark.parametrize("name", list(TASKS))
def test_every_task_keeps_the_contract(name: str, tmp_path: Path) -> None:
    task = TASKS.get(name)
    assert task.name == name and task.title and task.main_metric and task.max_new_tokens > 0
    assert task.root(None).parts[:2] == ("playground", "data")
    message = task.missing(task.root(tmp_path)) or ""
    assert str(tmp_path) in message and task.source in message and "\n" not in message
    with pytest.raises(UserError):
        task.load(task.root(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question_id": 1, "image": "a.png", "text": "?"}', "no field 'answer'"),
        ('{"question_id": 1, "image": "../a.png", "text": "?", "answer": "1", "category": "sign"}',
         "refused"),
        ("[1]", "must be an object"),
        ('{"question_id": 1, "image": "a.png", "text": "?", "answer": "", "category": "sign"}',
         "empty answer"),
        ("{", "not valid JSON"),
    ],
)  # fmt: skip
def test_damaged_questions(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "eval.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        TASKS.get("synthetic").load(tmp_path)
    assert "eval.jsonl" in str(caught.value)


def test_digests(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    assert model_digest(copy) == model_digest(tiny_checkpoint)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    assert model_digest(copy) != model_digest(tiny_checkpoint)
    task, image = Mixed(), Image.new("RGB", (4, 4))
    one = [Item(1, "q", (image,))]
    assert data_digest(task, one) == data_digest(task, [Item(1, "q", (image.copy(),))])
    assert data_digest(task, one) != data_digest(task, [Item("1", "q", (image,))])


def test_table_cells_stay_in_their_cell(tmp_path: Path) -> None:
    assert markdown([], "a | b").splitlines()[0] == "# a \\| b"
