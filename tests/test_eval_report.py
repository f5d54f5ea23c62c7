"""The report of an evaluation: its tables, its page, and that nothing in it is taken for markup."""

from __future__ import annotations

import csv
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fixtures_results import HOSTILE, make_results, make_rows, put_problem, put_task

from llava_uhd.errors import UserError
from llava_uhd.eval import report_items
from llava_uhd.eval.__main__ import main
from llava_uhd.eval.protocols import PROTOCOLS
from llava_uhd.eval.report import radar_of, write_report
from llava_uhd.eval.report_charts import Bar, Shape, bar_chart, cut, full_length, radar
from llava_uhd.eval.report_items import Album, choose
from llava_uhd.eval.results import collect, write_results
from llava_uhd.eval.tasks import TASKS

VOID = {"meta", "img", "br", "link", "input", "hr"}
SHARES = {"gqa": 0.62, "mmbench_cn": 0.57, "scienceqa": 0.7, "pope": 0.84}


class Page(HTMLParser):
    """Reads a page; every element that is opened is closed again."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        """Everything that is read, without the script and styles."""
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str]]:
        """Attributes of all elements of a kind."""
        return [known for name, known in self.tags if name == tag]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four whole tasks, a trial with hostile texts, and one that failed."""
    out = make_results(tmp_path_factory.mktemp("model") / "eval", SHARES, count=60)
    rows = make_rows("ai2d", 30, 0.5, 3, out.parent / "images")
    rows[0] |= dict.fromkeys(("question", "answer", "parsed", "prompt", "reference"), HOSTILE)
    rows[0] |= {"id": HOSTILE, "groups": {HOSTILE: HOSTILE}, "images": [f"/none/{HOSTILE}.jpg"]}
    rows[0]["metrics"] = {"accuracy": 0.0}
    put_task(out, "ai2d", rows, of=3088)
    put_problem(out, "docvqa")
    assert main(["report", str(out)]) == 1  # a task has no score
    return out


@pytest.fixture(scope="module")
def page(output: Path) -> Page:
    """The page, read."""
    return Page((output / "report.html").read_text("utf-8"))


def test_page_needs_nothing_beside_it(output: Path, page: Page) -> None:
    for name, known in page.tags:
        for key in ("src", "href", "action", "data", "xlink:href"):
            assert known.get(key, "data:image/").startswith("data:image/"), (name, known)
        assert not [key for key in known if key.startswith("on")], (name, known)
    assert [name for name, _ in page.tags].count("script") == 1
    assert not re.search(r"url\(|@import|https?://", (output / "report.html").read_text("utf-8"))


def test_hostile_texts_are_texts(output: Path, page: Page) -> None:
    assert {each.get("src", "")[:5] for each in page.named("img")} == {"data:"}
    shown = " ".join(HOSTILE.split())
    for word in ("question", "answer", "expected", "prompt as sent"):
        assert f"{word} {shown}" in page.text
    assert "(picture script>.jpg not shown)" in page.text  # what is behind the last slash
    assert "7: <b>cut off</b>" in page.text
    (item,) = [each for each in page.named("div") if "alert" in each.get("data-groups", "")]
    assert json.loads(item["data-groups"]) == [f"{HOSTILE}: {HOSTILE}"]
    markdown = (output / "results.md").read_text("utf-8")
    assert all(line.count(" | ") == 7 for line in markdown.split("\n")[2:10])


def test_page_tells_scores_and_failures(output: Path, page: Page) -> None:
    results = {result.task: result for result in collect(output)}
    for result in results.values():
        assert result.title in page.text
    assert "Without a score DocVQA val : 1 of 2 items have no answer" in page.text
    assert "not comparable with anything: AI2D test." in page.text
    assert "first 30 of 3088 only: not comparable" in page.text
    low, high = results["gqa"].intervals["accuracy"]["clt"]
    assert f"clt {low:.4g} to {high:.4g}" in page.text
    published = {each.system: each for _, each in results["mmbench_cn"].published}
    ours = results["mmbench_cn"].scores["accuracy"]
    difference = published["LLaVA-1.5 7B"].difference
    assert difference == pytest.approx(ours - 58.3)
    row = f"{ours:.4g} 58.3 {difference:+.4g} LLaVA-1.5 7B measured alike"
    assert row in page.text
    assert "measured as llava, published as uhd_v2; 60 questions instead of 12578" in page.text
    # A radar, and bars for each task that was scored.
    labels = [each["aria-label"] for each in page.named("svg")]
    assert labels[0] == "benchmarks beside published models"
    assert len(labels) == 1 + 5


def test_items_can_be_filtered(output: Path, page: Page) -> None:
    items = [each for each in page.named("div") if each.get("class", "").startswith("item ")]
    assert len(items) == 4 * 60 + 30
    for task in SHARES:
        rows = [json.loads(line) for line in (output / task / "items.jsonl").open()]
        wrong = sum(next(iter(row["metrics"].values())) == 0 for row in rows)
        found = [each["data-state"] for each in items if each["data-task"] == task]
        assert found.count("wrong") == wrong and found.count("right") == 60 - wrong
    assert {
        tuple(json.loads(each["data-groups"])) for each in items if each["data-task"] == "gqa"
    } == {(f"category: {name}",) for name in ("kitchen", "street", "text", "count")}
    options = {each["value"] for each in page.named("option")}
    assert {*SHARES, "ai2d", "wrong", "right", ""} == options


def test_trials_have_no_published_number_beside_them(tmp_path: Path) -> None:
    rows = make_rows("gqa", 20, 0.5, 1, tmp_path / "images")
    assert put_task(tmp_path / "a", "gqa", rows).published
    assert put_task(tmp_path / "b", "gqa", rows, of=21).published == []
    write_results(tmp_path / "b", "b")
    assert "Beside published" not in (tmp_path / "b/results.md").read_text()


def test_tables(output: Path) -> None:
    with (output / "results.csv").open() as file:
        rows = {row["task"]: row for row in csv.DictReader(file)}
    assert rows["gqa"]["published LLaVA-1.5 7B"] == "62.0" and rows["gqa"]["protocol"]
    assert rows["ai2d"]["published LLaVA-UHD v2 Qwen2-7B"] == ""
    assert float(rows["gqa"]["low"]) < float(rows["gqa"]["score"]) < float(rows["gqa"]["high"])
    assert rows["docvqa"]["score"] == ""
    tasks = json.loads((output / "results.json").read_text("utf-8"))["tasks"]
    assert tasks["gqa"]["intervals"]["accuracy"].keys() == {"clt", "bootstrap"}
    assert tasks["gqa"]["published"][0]["source"].startswith("LLaVA model zoo")
    markdown = (output / "results.md").read_text("utf-8")
    assert "## Beside published numbers" in markdown and "LLaVA-1.5 13B LoRA" in markdown


def test_bounds_of_pictures(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = (output / "report.html").stat().st_size
    monkeypatch.setattr(report_items, "MOST_PICTURES", 5)
    few = Page(write_report(output, "tiny").read_text("utf-8"))
    assert len(few.named("img")) == 5 and "pictures were left out: the page is full" in few.text
    monkeypatch.setattr(report_items, "MOST_PICTURES", 10**6)
    monkeypatch.setattr(report_items, "MOST_BYTES", 20_000)
    small = Page(write_report(output, "tiny").read_text("utf-8"))
    sizes = [len(each["src"]) for each in small.named("img")]
    assert sum(sizes[:-1]) < 20_000 <= sum(sizes)
    assert (output / "report.html").stat().st_size < full / 2


def test_pictures_are_made_once(tmp_path: Path) -> None:
    make_rows("gqa", 1, 0.5, 1, tmp_path)
    album = Album()
    first = album.picture(str(tmp_path / "0.jpg"))
    os.remove(tmp_path / "0.jpg")
    assert first and album.picture(str(tmp_path / "0.jpg")) == first
    assert album.picture(str(tmp_path / "none.jpg")) is None and album.left_out == 0


def test_choosing_items() -> None:
    rows = [{"id": n, "metrics": {"accuracy": float(n % 4 > 0)}} for n in range(1000)]
    found = choose(rows, "accuracy")
    wrong = [row for row in found if row["metrics"]["accuracy"] == 0]
    assert (len(found), len(wrong)) == (report_items.SHOWN, report_items.WRONG)
    assert [row["id"] for row in found] == sorted({row["id"] for row in found})
    assert max(row["id"] for row in wrong) > 900  # from all over the task
    assert len(choose(rows[:50], "accuracy")) == 50
    right = [row for row in rows if row["metrics"]["accuracy"]]
    assert len(choose(right, "accuracy")) == report_items.SHOWN
    assert len(choose([row for row in rows if row not in right], "x")) == report_items.SHOWN


def test_radar(output: Path) -> None:
    axes, shapes = radar_of(collect(output))
    assert len(axes) == 4 and len(shapes) == 5
    assert [shape.name for shape in shapes[:3]] == ["this model", "LLaVA-1.5 7B", "LLaVA-1.5 13B"]
    assert shapes[1].values == [62.0, 58.3, 85.9, 66.8]  # in the order of the tasks' names
    shapes = [Shape("us", [50, 100, 25, 10]), Shape("<b>", [100, None, 50, 10])]
    found = Page(f"<div>{radar('x', ['a', 'b', 'c', 'd'], shapes)}</div>")
    assert len(found.named("circle")) == 7 and "<b>" in found.text
    lines = [each for each in found.named("line") if "stroke" in each]
    assert len(lines) == 4 + 2  # open on both sides of what is missing
    # Half of the best value is half of the way.
    middle, reach = 350.0, 170.0
    tops = [float(each["cy"]) for each in found.named("circle") if float(each["cx"]) == middle]
    centre = reach + 30
    assert sorted(tops) == [centre - reach, centre - reach / 2, *sorted(tops)[2:]]
    assert radar("x", ["a", "b"], [Shape("us", [1, 2])]) == ""


def test_bars() -> None:
    assert [full_length(v) for v in ([0.2, 0.9], [3, 62.5], [125, 180], [])] == [1, 100, 180, 1]
    found = Page(
        "<p>" + bar_chart("x", [Bar("<i>", 25, 4), Bar("b", 100), Bar("c", -1)], 100) + "</p>"
    )
    widths = [float(each["width"]) for each in found.named("rect") if "fill" in each]
    assert widths == [pytest.approx(widths[1] / 4, abs=0.1), widths[1], 0]
    assert "<i>: 25 (4)" in found.text and bar_chart("x", [], 1) == ""
    assert bar_chart("x", [Bar("a", float("nan"))], 1) == "" and cut("a" * 30) == "a" * 25 + "…"


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no results"):
        main(["report", str(tmp_path)])


def test_documentation_lists_the_tasks() -> None:
    text = (Path(__file__).parents[1] / "docs/evaluation.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| `(.+?)` \| `(.+?)` \| (.+?) \|$", text, re.M)
    assert [row[0] for row in rows] == TASKS.names()
    for name, title, folder, metric, scored_by in rows:
        task = TASKS.get(name)
        assert (title, folder, metric) == (task.title, task.folder, task.main_metric)
        assert task.local == (scored_by == "here")
    assert re.findall(r"^\| `(\w+)` \| [^|]+ \|$", text, re.M) == sorted(
        PROTOCOLS.names(), key=["ours", "llava", "llavolta", "uhd_v1", "uhd_v2"].index
    )
    assert f"most {report_items.SHOWN} items" in text.replace("\n ", "")
    assert f"{report_items.MOST_PICTURES} pictures or {report_items.MOST_BYTES // 10**6} MB" in text
