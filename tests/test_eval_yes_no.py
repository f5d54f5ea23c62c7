"""Yes or no: POPE and MME."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fixtures_eval import answers_file, golden_scores, lines, scored, submitted

from llava_uhd.errors import UserError
from llava_uhd.eval.scoring import mme, pope
from llava_uhd.eval.tasks import TASKS
from llava_uhd.eval.tasks.mme import official_question, read_gold
from llava_uhd.eval.tasks.question_file import SHORT


@pytest.mark.parametrize("compatible", [False, True])
def test_pope_is_the_published_one(golden: Path, compatible: bool) -> None:
    folder = golden / "evaluation/pope"
    expected = golden_scores(folder)
    found = scored("pope", folder.parent, folder / "answers/toy-model.jsonl", compatible)
    assert found["scores"]["average_f1"] == pytest.approx(expected["average_f1"], abs=1e-9)
    assert found["scores"]["f1"] == pytest.approx(100 * expected["average_f1"], abs=1e-9)
    assert set(found["breakdown"]["category"]) == set(expected["categories"])
    for name, table in expected["categories"].items():
        row = found["breakdown"]["category"][name]
        assert row["items"] == table.pop("samples")
        line = [row[key] for key in ("f1", "accuracy", "precision", "recall", "yes_ratio")]
        assert ", ".join(f"{value:.3f}" for value in line) == table.pop("summary_line")
        assert {key: row[key] for key in table} == pytest.approx(table, abs=1e-9)
        assert found["scores"][f"{name} f1"] == pytest.approx(table["f1"], abs=1e-9)
    rows = expected["per_item"]
    pairs = {(row["id"], row["answer"], row["parsed"]) for row in found["items"]}
    assert pairs == {(row["question_id"], row["text"], row["parsed"]) for row in rows}
    assert len(found["items"]) == len(rows)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "yes"),
        ("no", "no"),
        ("No, it is", "no"),
        ("not here", "no"),
        ("NO", "yes"),
        ("nope", "yes"),
        ("no!", "yes"),
        ("No\nYes", "yes"),
        ("There isn't", "yes"),
        ("Yes. No.", "yes"),
    ],
)
def test_pope_answers(text: str, word: str) -> None:
    assert pope.read_answer(text) == word


def test_pope_divides_by_nothing() -> None:
    empty = {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}
    assert pope.measures(["no", "no"], ["yes", "no"]) == empty


def make_pope(root: Path) -> Path:
    folder = root / "pope"
    labels = {"adversarial": ["yes", "no"], "popular": ["no"], "random": ["yes"]}
    for category, found in labels.items():
        rows = [{"question_id": n, "label": label} for n, label in enumerate(found)]
        lines(folder / f"coco/coco_pope_{category}.json", rows)
    ids = {10: "adversarial", 30: "random", 11: "adversarial", 20: "popular"}
    rows = [
        {"question_id": n, "image": "a.jpg", "text": "T", "category": c} for n, c in ids.items()
    ]
    lines(folder / "llava_pope_test.jsonl", rows)
    return folder


def test_pope_on_small_files(tmp_path: Path) -> None:
    folder = make_pope(tmp_path)
    message = TASKS.get("pope").missing(folder)
    assert message and str(folder / "val2014") in message and "POPE" in message
    texts = {11: "No", 10: "Yes", 20: "no", 30: "Yes."}
    file = answers_file(tmp_path / "a.jsonl", texts)
    assert scored("pope", tmp_path, file)["scores"]["adversarial accuracy"] == 1
    # The published program pairs by position: 11 stands first and meets the label of 10.
    published = scored("pope", tmp_path, file, compatible=True)["scores"]
    assert published["adversarial accuracy"] == 0 and published["random f1"] == 1
    del texts[10]
    short = answers_file(tmp_path / "s.jsonl", texts)
    for compatible in (False, True):
        with pytest.raises(UserError, match="1 of 4 questions of pope have no answer"):
            scored("pope", tmp_path, short, compatible)
    lines(folder / "coco/coco_pope_random.json", [{"label": "yes"}, {"label": "no"}])
    with pytest.raises(UserError, match="asks 1 random questions, .* has 2 labels"):
        scored("pope", tmp_path, file)


def test_mme_is_the_official_one(golden: Path) -> None:
    folder = golden / "evaluation/MME"
    expected = golden_scores(folder)
    answers = folder / "answers/toy-model.jsonl"
    numbers = {**expected["categories"]}
    numbers |= {name: expected[name] for name in ("perception", "cognition")}
    for compatible in (False, True):
        found = scored("mme", folder.parent, answers, compatible)
        assert found["scores"] == pytest.approx(numbers, abs=1e-9)
        rows = expected["per_item"]
        assert [row["id"] for row in found["items"]] == [row["question_id"] for row in rows]
        assert [row["parsed"] for row in found["items"]] == [row["parsed"] for row in rows]
    files = submitted("mme", folder.parent, answers)
    wanted = folder / "eval_tool/answers/toy-model"
    assert files == {file.name: file.read_bytes() for file in wanted.iterdir()}
    for file in wanted.iterdir():
        TASKS.get("mme").check_submission(folder, file)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("YES", "yes"),
        ("Yes, it is.", "yes"),
        ("Not sure", "no"),
        ("I know", "other"),
        ("know", "no"),
        ("None", "no"),
        ("Oh yes", "other"),
        ("", "other"),
    ],
)
def test_mme_answers(text: str, word: str) -> None:
    assert mme.read_answer(text) == word


def test_mme_categories() -> None:
    scores = mme.category_scores([True, True, True, False], "aabb")
    assert scores == {"acc": 75, "acc_plus": 50, "score": 125}
    assert mme.totals({"OCR": 125, "count": 10, "else": 9}) == {"perception": 135}
    assert len(mme.PERCEPTION) == 10 and len(mme.COGNITION) == 4


def make_mme(root: Path) -> Path:
    folder = root / "MME"
    release = folder / "MME_Benchmark_release_version"
    for place, ending in (("posters/questions_answers_YN", "  "), ("color", " ")):
        (release / place).mkdir(parents=True)
        for name in ("a", "b"):
            text = "".join(
                f"Is it {n}?{ending}Please answer yes or no.\t{label}\n"
                for n, label in ((1, "Yes"), (2, "No"))
            )
            (release / place / f"{name}.txt").write_text(text, "utf-8")
    rows: list[Any] = []
    for path in ("posters/images/a.jpg", "posters/images/b.jpg", "color/a.jpg", "color/b.jpg"):
        for n in (1, 2):
            rows.append({"question_id": path, "image": path, "text": f"Is it {n}?{SHORT}"})
    lines(folder / "llava_mme.jsonl", rows)
    return folder


def test_mme_on_small_files(tmp_path: Path) -> None:
    folder = make_mme(tmp_path)
    task = TASKS.get("mme")
    items = task.load(folder)
    assert len(items) == 8 and items[0].images == (
        folder / "MME_Benchmark_release_version/posters/images/a.jpg",
    )
    assert [item.reference for item in items] == ["Yes", "No"] * 4
    texts = ["yes", "yes", "yes", "yes", "Yes", "no\tsir\nx", "No", "no"]
    rows = [task.published_row(item, text, "m") for item, text in zip(items, texts)]
    file = lines(tmp_path / "a.jsonl", rows)
    scores = {"perception": 175, "posters": 50, "color": 125}
    assert scored("mme", tmp_path, file)["scores"] == scores
    files = submitted("mme", tmp_path, file)
    assert files["color.txt"].decode().splitlines()[1] == (
        "a.txt\tIs it 2? Please answer yes or no.\tNo\tno sir x"
    )
    assert "a.txt\tIs it 2?  Please" in files["posters.txt"].decode()
    upload = tmp_path / "color.txt"
    upload.write_bytes(files["color.txt"])
    task.check_submission(folder, upload)
    upload.write_bytes(files["color.txt"] + b"a.txt\tx\n")
    with pytest.raises(UserError, match="line 5: must be file, question"):
        task.check_submission(folder, upload)
    # Pairs by position go wrong when the order of the file is another one.
    mixed = lines(tmp_path / "m.jsonl", [rows[n] for n in (0, 2, 1, 3, 4, 5, 6, 7)])
    assert scored("mme", tmp_path, mixed)["scores"] == scores
    assert scored("mme", tmp_path, mixed, compatible=True)["scores"]["posters"] == 100
    odd = [{**rows[0], "prompt": "Else?"}, *rows[1:]]
    with pytest.raises(UserError, match="belong to no question of mme"):
        scored("mme", tmp_path, lines(tmp_path / "o.jsonl", odd))
    with pytest.raises(UserError, match=r"'posters/images/a\.jpg Else\?' belongs to no question"):
        submitted("mme", tmp_path, tmp_path / "o.jsonl")


def test_mme_questions(tmp_path: Path) -> None:
    gold = {("a", "Is it?  Please answer yes or no."): "Yes"}
    assert official_question("Is it?" + SHORT, "a", gold) == next(iter(gold))[1]
    assert official_question("Is that?" + SHORT, "a", gold) is None
    (tmp_path / "color").mkdir()
    with pytest.raises(UserError, match="holds no files of questions"):
        read_gold(tmp_path, "color")
    (tmp_path / "color/a.txt").write_text("Is it?\tMaybe\n")
    with pytest.raises(UserError, match="a.txt, line 1: must be a question"):
        read_gold(tmp_path, "color")
    folder = make_mme(tmp_path)
    row = {"question_id": "color/a.jpg", "image": "color/a.jpg", "text": f"Is it 3?{SHORT}"}
    lines(folder / "llava_mme.jsonl", [row])
    with pytest.raises(UserError, match=r"is no question of color/a\.txt"):
        TASKS.get("mme").load(folder)


@pytest.mark.parametrize(
    ("file", "row", "message"),
    [
        ("llava_pope_test.jsonl", {"question_id": None}, "id None under .* must be a text"),
        ("llava_pope_test.jsonl", {"question_id": [1]}, "must be a text or a whole number"),
        ("llava_pope_test.jsonl", {"text": 7}, "must be a text, got int"),
        ("llava_pope_test.jsonl", {"category": ["random"]}, "not in the published form"),
        ("coco/coco_pope_random.json", {"label": ["yes"]}, "not in the published form"),
    ],
)
def test_values_of_other_kinds_are_told(
    tmp_path: Path, file: str, row: dict[str, Any], message: str
) -> None:
    (make_pope(tmp_path) / "val2014").mkdir()
    path = tmp_path / "pope" / file
    first, *others = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text(json.dumps({**json.loads(first), **row}) + "\n" + "".join(others), "utf-8")
    with pytest.raises(UserError, match=message):
        TASKS.get("pope").load(tmp_path / "pope")
