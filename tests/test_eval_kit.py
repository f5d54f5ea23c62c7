"""OCRBench, MMMU, RealWorldQA, HR-Bench: tables with images, exact matching, reports."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures_eval import answers_file, golden_scores, same, scored, whole
from fixtures_tables import encoded, small_choices, table
from fixtures_tiny import tiny_parts

from llava_uhd.errors import UserError
from llava_uhd.eval.generate import Answerer, Limits, image_size
from llava_uhd.eval.provenance import data_digest
from llava_uhd.eval.task import Task
from llava_uhd.eval.tasks import TASKS
from llava_uhd.eval.tasks.kit import LETTER_ZH, ChoiceTask, choice_prompt
from llava_uhd.eval.tasks.mmmu import MMMU
from llava_uhd.eval.tasks.question_file import LETTER, SHORT
from llava_uhd.images.pixels import open_image


def test_ocrbench_equals_the_published_scorer(golden: Path, tmp_path: Path) -> None:
    folder = golden / "evaluation/ocrbench"
    expected = golden_scores(folder)
    # The table of predictions holds the right answers: no other file is needed.
    result = scored("ocrbench", tmp_path, folder / "predictions.json")
    same([item["score"] for item in result["items"]], expected["per_item"])
    assert result["scores"]["final_score"] == expected["final_score"]
    assert result["scores"]["text_recognition"] == expected["text_recognition"]
    found = {name: row["right"] for name, row in result["breakdown"]["category"].items()}
    assert found == expected["by_category"]
    assert TASKS.get("ocrbench").scale * 1000 == 100


def test_mmmu_equals_the_published_scorer(golden: Path, tmp_path: Path) -> None:
    folder = golden / "evaluation/vlmkit_mcq"
    expected = golden_scores(folder)
    result = scored("mmmu", tmp_path, folder / "mmmu_val.json")
    same([item["metrics"]["accuracy"] for item in result["items"]], expected["mmmu_hits"])
    assert result["scores"]["accuracy"] == pytest.approx(100 * expected["mmmu_overall"], abs=1e-7)
    found = {
        name: row["accuracy"]
        for group in ("category", "l2-category")
        for name, row in result["breakdown"][group].items()
    }
    report = {
        name: 100 * row[0] for name, row in expected["mmmu_report"].items() if name != "split"
    }
    assert {**found, "Overall": result["scores"]["accuracy"]} == pytest.approx(report, abs=1e-7)


def test_hrbench_equals_the_published_scorer(golden: Path, tmp_path: Path) -> None:
    folder = golden / "evaluation/vlmkit_mcq"
    expected = golden_scores(folder)
    result = scored("hrbench4k", tmp_path, folder / "hrbench.json")
    same([item["score"] for item in result["items"]], expected["hrbench_hits"])
    cycles = result["breakdown"]["cycle_category"]
    for cycle, category, value in expected["hrbench_report"]:
        row = result["scores"] if cycle == "Average" else cycles[cycle]
        name = "accuracy" if category == "all" else f"accuracy_{category}"
        assert row[name] == pytest.approx(100 * value, abs=1e-7)


def small_mmmu(root: Path) -> Path:
    two = f"['{encoded(1)}', '{encoded(2)}']"
    rows = [
        {"index": 1, "question": "Is <image 2> after <image 1>?", "A": "yes", "B": "no",
         "image": two, "answer": "A", "split": "validation", "category": "Art"},
        {"index": 2, "question": "In <image 1>: how much?", "image": encoded(3), "answer": "12.5",
         "split": "validation", "category": "Art"},
        {"index": 3, "question": "Shown", "A": "x", "B": "y", "image": encoded(4), "answer": "B",
         "split": "validation", "category": "Music"},
        {"index": 4, "question": "Dev", "A": "x", "B": "y", "image": encoded(4), "answer": "B",
         "split": "dev", "category": "Music"},
    ]  # fmt: skip
    return table(root / "mmmu/MMMU_DEV_VAL.tsv", rows)


def test_images_of_mmmu_stand_where_they_are_named(tmp_path: Path) -> None:
    small_mmmu(tmp_path)
    task = TASKS.get("mmmu")
    items = task.load(task.root(tmp_path))
    assert [item.id for item in items] == [1, 2, 3]
    assert items[0].question == f"Is <image> after <image>?\nA. yes\nB. no{LETTER}"
    assert [open_image(each).size[0] for each in items[0].images] == [14, 13]
    assert items[1].question == f"In <image>: how much?{SHORT}"
    assert [turn.text for turn in task.turns(items[2])] == [f"<image>\nShown\nA. x\nB. y{LETTER}"]
    # As LLaVA-UHD v2 was measured: one image in front.
    kit = MMMU()
    kit.style = "kit"
    first = kit.load(kit.root(tmp_path))[0]
    assert [open_image(each).size[0] for each in first.images] == [13]
    assert first.question == (
        "Question: Is  after ?\nOptions:\nA. yes\nB. no\n"
        f"Please select the correct answer from the options above. \n{LETTER}"
    )


def test_mmmu_from_its_table_with_other_files_of_answers(tmp_path: Path) -> None:
    small_mmmu(tmp_path)
    texts = {1: "It must be (A) then", 2: "about 12.5 euro", 3: "B"}
    result = scored("mmmu", tmp_path, answers_file(tmp_path / "a.jsonl", texts))
    assert result["scores"] == pytest.approx({"accuracy": 100, "accuracy_official": 100})
    rows = [{"index": k, "prediction": t, "split": "validation"} for k, t in texts.items()]
    rows += [{"index": 4, "prediction": "of another split", "split": "dev"}]
    by_table = scored("mmmu", tmp_path, table(tmp_path / "p.tsv", rows))
    assert by_table["scores"] == result["scores"]
    empty = whole(tmp_path / "p.json", [{"index": k, "prediction": None} for k in (1, 2, 3)])
    assert scored("mmmu", tmp_path, empty)["scores"]["accuracy"] == 0
    with pytest.raises(UserError, match=r"2 of 3 questions of mmmu have no answer \(2, 3\)"):
        scored("mmmu", tmp_path, answers_file(tmp_path / "b.jsonl", {1: "A"}))
    with pytest.raises(UserError, match="MMMU_DEV_VAL.tsv is missing; get MMMU_DEV_VAL.tsv of"):
        scored("mmmu", tmp_path / "none", empty)


def test_prompts_of_choices() -> None:
    row = {"question": "Which?", "hint": "Look."}
    options = {"A": "one", "B": "two"}
    assert choice_prompt(row, options, "llava") == f"Look.\nWhich?\nA. one\nB. two{LETTER}"
    assert choice_prompt(row, options, "kit") == (
        "Hint: Look.\nQuestion: Which?\nOptions:\nA. one\nB. two\n"
        "Please select the correct answer from the options above. \n"
        "\nAnswer with the option's letter from the given choices directly."
    )
    assert choice_prompt({"question": "哪个?"}, options, "llava").endswith(LETTER_ZH)


def test_the_folder_of_the_kit_is_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_choices(tmp_path / "kit/HRBench8K.tsv")
    monkeypatch.setenv("LMUData", str(tmp_path / "kit"))
    task = TASKS.get("hrbench8k")
    assert task.root(tmp_path / "eval") == tmp_path / "kit"
    items = task.load(task.root(tmp_path / "eval"))
    # A short text in place of an image is the index of the row that has it.
    assert items[2].images == items[3].images == items[1].images != items[0].images
    monkeypatch.setenv("LMUData", str(tmp_path / "none"))
    assert task.root(tmp_path / "eval") == tmp_path / "eval/hrbench"


def test_images_in_tables_are_answered(tmp_path: Path) -> None:
    small_choices(tmp_path / "realworldqa/RealWorldQA.tsv")
    task = TASKS.get("realworldqa")
    assert isinstance(task, ChoiceTask)
    items = task.load(task.root(tmp_path))
    answerer = Answerer(*tiny_parts(), task, Limits(4, 1, 4))
    # Their sizes are known, so that like lengths are answered together.
    tokens = answerer.processor.num_image_tokens(12, 10)
    text = sum(len(turn.text) for turn in task.turns(items[0])) // 4
    assert image_size(items[0].images[0]) == (12, 10)
    assert answerer.length(items[0]) == text + tokens
    outcomes = list(answerer.run(items))
    assert not [each for outcome in outcomes for each in outcome.failures]
    assert [each.id for outcome in outcomes for each in outcome.answers] == [0, 1, 2, 3]
    assert len(data_digest(task, items)) == 16


def test_mistakes_in_tables(tmp_path: Path) -> None:
    task: Task = TASKS.get("ocrbench")
    row = {"index": 0, "question": "?", "answer": "['x'", "category": "Handwriting Recognition"}
    file = table(tmp_path / "ocrbench/OCRBench.tsv", [{**row, "image": encoded(0)}])
    with pytest.raises(UserError, match=r"OCRBench.tsv, row 1: the answer .* is no list"):
        task.load(file.parent)
    table(file, [{**row, "category": "Else", "image": encoded(0)}])
    with pytest.raises(UserError, match="row 1: the category 'Else' is none of OCRBench"):
        task.load(file.parent)
    table(file, [{**row, "image": "77"}])
    with pytest.raises(UserError, match="row 1: row '0' has no image"):
        task.load(file.parent)
    table(tmp_path / "mmmu/MMMU_DEV_VAL.tsv",
          [{"index": 1, "question": "<image 3>", "answer": "x", "image": encoded(0)}])  # fmt: skip
    with pytest.raises(UserError, match=r"names <image 3> but has 1 images"):
        TASKS.get("mmmu").load(tmp_path / "mmmu")
