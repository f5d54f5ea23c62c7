"""The report: one page without anything beside it, for one run or several, finished or not."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fixtures_runs import FROM_NOTHING, Train

from llava_uhd.errors import UserError
from llava_uhd.page import short, ticks
from llava_uhd.train import report
from llava_uhd.train.log import append_stage
from llava_uhd.train.record import HIDDEN
from llava_uhd.train.report import ReportCallback, write_report
from llava_uhd.train.report_charts import MOST_POINTS, Mark, Series, area_chart, line_chart, thin
from llava_uhd.train.report_samples import read_samples


class Page(HTMLParser):
    """Whatever a page would fetch, and whether its elements are closed."""

    VOID = ("meta", "br", "img", "line", "polyline", "polygon", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "action", "data", "srcset", "xlink:href"):
                self.fetched += [] if str(value).startswith(("data:", "#")) else [str(value)]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


def read(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched == [] and page.open == []
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(", text)
    return text, page


# --- charts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 0.001, [0, 0.0002, 0.0004, 0.0006, 0.0008, 0.001]),
        (3, 3, [3]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_numbers_are_short() -> None:
    assert [short(v) for v in (0.00002, 12000, 3.5e6, 0.25)] == ["2e-05", "12k", "3.5M", "0.25"]


def test_many_points_are_averaged() -> None:
    points = [(float(n), float(n)) for n in range(4 * MOST_POINTS)]
    thinned = thin(points)
    assert len(thinned) == MOST_POINTS and thinned[0] == (1.5, 1.5)
    assert thin(points[:3]) == points[:3]


def test_lines_and_areas() -> None:
    svg = line_chart(
        "a", [Series("x<y", [(1, 1.0), (2, float("nan")), (3, 2.0)])], [Mark(2, 2, "2/8")]
    )
    Page(svg)
    assert "x&lt;y" in svg and "2/8" in svg and "nan" not in svg
    assert line_chart("a", [Series("x", [])]) == "" and area_chart("a", [], []) == ""
    Page(line_chart("one point", [Series("x", [(1, 0.0)])]))
    area = area_chart("a", [1, 2], [("lower", [1.0, 1.0]), ("upper", [2.0, 1.0])])
    assert Page(area).tags.count("polygon") == 2
    assert Page(area_chart("one step", [1], [("lower", [1.0])])).tags.count("polygon") == 1


# --- pages ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(workplace: Path) -> Path:
    from fixtures_runs import run_here

    words = ("--trainer.max_steps", "3", "--trainer.save_steps", "2", "--compression.schedule",
             "1/2 off", "--stage.learn.projector", "0.001")  # fmt: skip
    return run_here(workplace, "debug/finetune", "out/report", *FROM_NOTHING, *words)


def test_report_of_a_finished_run(finished: Path) -> None:
    text, page = read(finished / report.REPORT_FILE)
    for word in (
        *("Loss per learned token", "Learning rates", "Gradient norm", "Tokens per second", "MFU"),
        *("Seconds of a step", "waiting for data", "language model, backward", "Samples"),
        *("multiply-add is 2", "measured: float32 product", "finished", "1/2", "seed: 42"),
        *("debug/finetune", "sha256", "final_loss", "projector, forward", "3 of 3"),
    ):
        assert word in text, word
    assert page.tags.count("svg") >= 8
    assert text.count("data:image/jpeg") >= 1
    for sample in read_samples(finished):
        learned = [piece["text"] for piece in sample["pieces"] if piece["kind"] == "learned"]
        assert learned and sample["learned"] > 0
        assert f'<span class="learned">{escape(learned[0])}</span>' in text
    assert "border" in text, "the stages of compression have a border"


def test_written_at_each_checkpoint(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    original = ReportCallback.on_save

    def on_save(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        assert f"{state.global_step} of 3" in (self.folder / report.REPORT_FILE).read_text()
        steps.append(state.global_step)

    monkeypatch.setattr(ReportCallback, "on_save", on_save)
    words = ("--trainer.max_steps", "3", "--trainer.save_steps", "1")
    train("debug/pretrain", "out/report_saves", *words)
    assert steps[:2] == [1, 2]


def test_held_out_loss_is_drawn(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "held"
    shutil.copytree(finished, folder)
    with (folder / "log.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 2, "eval_loss": 5.25}) + "\n")
    text, _ = read(write_report([folder]))
    assert "held out" in text and "5.25" in text and "<circle" in text


def test_evaluation_of_a_run(train: Train) -> None:
    words = ("--data.holdout", "4", "--trainer.max_steps", "2", "--trainer.eval_steps", "1")
    folder = train("debug/pretrain", "out/report_held_out", *words)
    text, page = read(folder / report.REPORT_FILE)
    assert "held out" in text and page.tags.count("circle") == 2
    assert "Answers to held-out samples" in text and "After step 2" in text


def test_a_folder_with_little_in_it(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(
        json.dumps({"step": 1, "loss": 2.0}) + "\n" + json.dumps({"step": 2, "loss": 1.5})[:10]
    )
    text, _ = read(write_report([tmp_path]))
    assert "Loss per learned token" in text and "MFU" not in text.split("</style>")[1]
    append_stage(tmp_path, 0, 1, 2, {"compression_layer": 2, "compression_stride": 8})
    read(write_report([tmp_path]))


def test_texts_are_escaped_and_secrets_left_out(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(finished, folder)
    found = read_samples(folder)
    found[0]["pieces"].append({"kind": "learned", "text": "<script>alert(1)</script>"})
    (folder / "samples.json").write_text(json.dumps(found))
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace("trainer:", "trainer:\n  hub_token: abc123"))
    text, _ = read(write_report([folder]))
    assert "&lt;script&gt;alert(1)" in text
    assert "abc123" not in text and HIDDEN in text


def test_two_runs_side_by_side(
    train: Train,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = train("debug/pretrain", "out/report_other", "--trainer.max_steps", "2")
    monkeypatch.setattr(sys, "argv", ["report", str(finished), str(other)])
    report.main()
    target = finished / "comparison.html"
    assert str(target) in capsys.readouterr().out
    text, _ = read(target)
    assert "2 runs side by side" in text and "What differs in the recipes" in text
    assert "stage.name" in text and text.count("Seconds of a step: debug/") == 2
    assert text.index("debug/finetune") < text.index("debug/pretrain")


def test_command_tells_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(UserError, match=r"has no log\.jsonl"):
        report.main()


def test_a_full_disk_does_not_end_the_run(
    finished: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class State:
        is_world_process_zero = True

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_whole", full)
    ReportCallback(finished).on_save(None, State(), None)  # type: ignore[arg-type]
    assert "was not written" in caplog.text
