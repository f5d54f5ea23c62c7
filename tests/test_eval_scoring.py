"""Pure scores of documents, charts, boxes and choices against those of the published scorers."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from llava_uhd.eval.scoring import choice
from llava_uhd.eval.scoring.anls import anls, anls_uhd_v2, edit_distance
from llava_uhd.eval.scoring.boxes import box_totals, overlap, parse_box
from llava_uhd.eval.scoring.ocrbench import CATEGORIES, FORMULAS, ocrbench_hit, ocrbench_totals
from llava_uhd.eval.scoring.relaxed import parse_number, relaxed_accuracy, relaxed_match


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_documents_and_charts_as_published(golden: Path) -> None:
    scores = read(golden / "evaluation/docvqa/scores.json")
    totals: dict[str, float] = {}
    for row in scores["per_item"]:
        said, gold, several = row["prediction"], row["answer"], row["multi"]
        pairs = {
            "anls_v2": (anls_uhd_v2(said, gold), row["anls_v2"]),
            "anls_standard": (anls(said, [gold]), row["anls_standard"]),
            "relaxed_standard": (relaxed_match(said, gold), row["relaxed_standard"]),
            "anls_standard_multi_answer": (
                anls(said, several["answers"]),
                several["anls_standard"],
            ),
            "relaxed_standard_multi_answer": (
                relaxed_accuracy(said, several["answers"]),
                several["relaxed_standard"],
            ),
        }
        for name, (got, expected) in pairs.items():
            assert got == pytest.approx(expected, abs=1e-9), (name, row)
            totals[name] = totals.get(name, 0) + 100 * got / scores["samples"]
    assert len(scores["per_item"]) == scores["samples"]
    for name, total in totals.items():
        assert total == pytest.approx(scores[name], abs=1e-9), name


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("July", "Jul", 1), ("ab", "ba", 2)],
)
def test_edit_distance(first: str, second: str, distance: int) -> None:
    assert edit_distance(first, second) == edit_distance(second, first) == distance


def test_anls_at_its_edges() -> None:
    assert anls("ab", ["abcd"]) == anls_uhd_v2("ab", "abcd") == 0.5  # exactly the threshold
    assert anls("ab", ["abcde"]) == anls_uhd_v2("ab", "abcde") == 0
    assert anls("", [""]) == anls_uhd_v2("", " ") == 1
    # Inner white space: collapsed by the standard one, but the length is that of the original.
    assert anls("a   b", ["a b"]) == 1 and anls_uhd_v2("a   b", "a b") == 0.6
    assert anls("x   y", ["a b"]) == pytest.approx(0.6)
    with pytest.raises(ValueError):
        anls("a", [])


def test_relaxed_at_its_edges() -> None:
    assert [parse_number(text) for text in ("50%", "1e3", "1,000", "$5", "")] == [
        0.5, 1000, None, None, None,
    ]  # fmt: skip
    assert relaxed_match("105", "100") == 1 and relaxed_match("105.1", "100") == 0
    assert relaxed_match("50%", "50") == 0 and relaxed_match("50%", "0.5") == 1
    assert relaxed_match("0.0", "0") == 0 and relaxed_match(" 0 ", "0") == 1
    assert relaxed_match("nan", "5") == 0 and relaxed_match("Yes", "yes") == 1


def test_boxes_as_published(golden: Path) -> None:
    folder = golden / "evaluation/rec"
    questions = lines(folder / "llava_ref3_test_2017.jsonl")
    splits = {row["question_id"]: row["category"] for row in questions}
    labels = {row["question_id"]: row["label"] for row in lines(folder / "llava_ref3_labels.jsonl")}
    overlaps: dict[str, list[float | None]] = {}
    for row in lines(folder / "answers/llava_ref3_test_2017/toy-model/merge.jsonl"):
        box, label = parse_box(row["text"]), parse_box(labels[row["question_id"]])
        assert label is not None
        value = None if box is None else overlap(box, label)
        overlaps.setdefault(splits[row["question_id"]], []).append(value)
    expected = read(folder / "scores.json")["splits"]
    assert overlaps.keys() == expected.keys()
    for name, values in overlaps.items():
        totals, split = box_totals(values), expected[name]
        assert (totals.samples, totals.parsed) == (split["samples"], split["parsed"])
        assert totals.accuracy == pytest.approx(split["accuracy_over_all"], abs=1e-9)
        assert totals.accuracy_of_parsed == pytest.approx(split["accuracy_over_parsed"], abs=1e-9)
        assert totals.mean_iou_of_parsed == pytest.approx(split["mean_iou_over_parsed"], abs=1e-9)


def test_boxes_at_their_edges() -> None:
    assert parse_box("0.1,0.2,0.3,0.4") == (0.1, 0.2, 0.3, 0.4)
    assert parse_box("nan, 0, 1, 1") is None and parse_box("0, 0, 1e999, 1") is None
    for text in ("", "[0.1, 0.2, 0.3]", "[a, b, c, d]", "[1,2,3,4,5]", "It is\n\n[0, 0, 1, 1]"):
        assert parse_box(text) is None
    whole = (0.0, 0.0, 1.0, 1.0)
    assert overlap(whole, (0.0, 0.0, 1.0, 0.5)) == 0.5  # not above the threshold
    assert overlap((1.0, 1.0, 0.0, 0.0), whole) == 0 and overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0
    assert box_totals([0.5, None, 0.6]) == pytest.approx((1 / 3, 1 / 2, 0.55, 3, 2))
    assert box_totals([None]) == (0, 0, 0, 1, 0)
    with pytest.raises(ValueError):
        box_totals([])


def test_ocrbench_as_published(golden: Path) -> None:
    folder = golden / "evaluation/ocrbench"
    scores = read(folder / "scores.json")
    hits = []
    for row in read(folder / "predictions.json"):
        accepted, category = ast.literal_eval(row["answer"]), row["category"]
        hits.append((category, ocrbench_hit(row["prediction"], accepted, category)))
    assert [hit for _, hit in hits] == scores["per_item"]
    for category, count in scores["by_category"].items():
        assert category in CATEGORIES
        assert sum(hit for name, hit in hits if name == category) == count
    totals = ocrbench_totals(hits)
    assert totals["Final Score"] == scores["final_score"]
    assert totals["Text Recognition"] == scores["text_recognition"]
    assert totals["Final Score Norm"] == scores["final_score"] / 10


def test_ocrbench_formulas_keep_case_and_lose_spaces() -> None:
    assert ocrbench_hit("x ^ 2\n+ 1", ["x^2 + 1"], FORMULAS) == 1
    assert ocrbench_hit("X^2", ["x^2"], FORMULAS) == 0 and ocrbench_hit("X^2", ["x^2"], "KIE") == 1
    assert ocrbench_hit("any", [""], FORMULAS) == 1 and ocrbench_hit("any", [], FORMULAS) == 0


def test_choices_as_published(golden: Path) -> None:
    for row in read(golden / "evaluation/vlmkit_mcq/cases.json"):
        letter = choice.choose(row["prediction"], row["choices"])
        assert (letter or False) == row["prefetch"], row
        assert (letter or choice.NOTHING) == row["extracted"], row


def test_yes_and_no_as_published(golden: Path) -> None:
    for row in read(golden / "evaluation/vlmkit_yesno/cases.json"):
        assert choice.yes_or_no(row["text"]) == row["extracted"], row
    # A comma between digits deletes every mark instead of writing spaces.
    assert choice.yes_or_no("1,2 no/yes") == "Unknown" and choice.yes_or_no("no/way") == "No"


def test_choices_at_their_edges() -> None:
    options = {"A": "tea", "B": "a cup of blue tea", "C": "None"}
    assert choice.choose("B x x x", options) == "B"
    # Five words from the end it is a word, and the answer is too long for a text.
    assert (
        choice.choose("A cup it is not, but what is it then, who would ever know", options) is None
    )
    assert choice.choose("A cup of tea, I say", options, earlier_kit=True) == "A"
    assert choice.choose("the correct answer is B, not A", options) == "B"
    assert choice.choose("the correct answer is B, not A", options, earlier_kit=True) is None
    assert choice.choose("the answer is cup A B", options) == "C"  # as published: no end of a word
    assert choice.choose("Failed to obtain answer via API B", {"A": "x", "B": "y"}) is None
    assert choice.choose("Z", options) == choice.NOTHING
    row = {"A": "x", "B": None, "C": "", "D": 4, "question": "q"}
    assert choice.read_options(row) == {"A": "x", "D": "4"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("(B)", "B"),
        ("A (B) (C)", "C"),
        ("B.", "B"),
        ("I think C is it, not A at all", "A"),
        ("x B.y", "B"),
        ("it looks to me like a cup of tea", "A"),
        ("tea", None),
        ("", None),
        ("'B'", "B"),
    ],
)
def test_official_parser_of_mmmu(answer: str, letter: str | None) -> None:
    assert choice.mmmu_letter(answer, {"A": "Tea", "B": "wine", "C": "sand"}) == letter


@pytest.mark.parametrize(
    ("answer", "references", "right"),
    [
        ("So the total is 1,200.", ["1200"], 1),
        ("12.504", ["12.5"], 1),
        ("12.51", ["12.5"], 0),
        ("The answer is an owl", ["Owl"], 1),
        ("bad", ["a"], 0),
        ("it is a", ["a"], 1),
        ("x = 4", ["4"], 1),
        ("x = 4\nnothing", ["4"], 1),
        ("3e2", ["300"], 1),
        ("cat", ["dog", "cat"], 1),
        ("", ["x"], 0),
    ],
)
def test_open_questions_of_mmmu(answer: str, references: list[str], right: int) -> None:
    assert choice.mmmu_open_match(answer, references) == right
