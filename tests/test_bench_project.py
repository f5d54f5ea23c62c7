"""``bench project``: forms equal, figures complete, refusals."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from llava_uhd.bench import project
from llava_uhd.bench.__main__ import COMMANDS, main
from llava_uhd.bench.project import (
    GivenMaps,
    Task,
    in_process,
    largest_errors,
    measure,
    scale_list,
)
from llava_uhd.errors import UserError
from llava_uhd.projectors.hiwin import HiwinProjector

TINY = Task("tiny", 128, (1, 4), 2)


def bench(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", "project", *words])
    return main()


def test_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert project in COMMANDS
    monkeypatch.setattr(project, "in_process", measure)  # no new processes
    file = tmp_path / "figures.json"
    words = ("--preset", "tiny", "--width", "128", "--views", "2", "--scales", "1,2")
    assert bench(monkeypatch, *words, "--json", str(file)) == 0
    printed = capsys.readouterr().out
    assert "forward and backward, maps given" in printed and "vision tower" in printed
    figures = json.loads(file.read_text())
    assert figures["passed"] and figures["scales"] == [1, 2]
    assert [one["title"] for one in figures["comparisons"]] == list(project.TITLES.values())
    for one in figures["comparisons"]:
        assert one["speedup"] > 0 and set(one["rows"]) == {"plain", "fast"}
        assert one["errors"]["output"] <= 1e-5
    assert 0 < figures["comparisons"][1]["errors"]["gradients"] <= 1e-4
    assert figures["tower"]["flops"]["fast"] < figures["tower"]["flops"]["plain"]
    monkeypatch.setattr(project, "OUTPUT_BOUND", 0.0)
    assert bench(monkeypatch, *words) == 1
    assert "FAILED: forward, maps given" in capsys.readouterr().out


def test_a_process_of_its_own() -> None:
    """The same numbers as here, and memory as the system counts it."""
    here, there = measure(TINY, "fast", 1, 1), in_process(TINY, "fast", 2, 1)
    assert len(there.times) == 2 and min(there.times) > 0
    if Path("/proc/self/clear_refs").exists():
        assert there.peak_bytes > 2**20
    assert largest_errors(here, there) == {"output": 0.0, "gradients": 0.0}


def test_given_maps_equal_those_of_the_upsampler() -> None:
    """Handing the maps over measures the same projector."""
    whole, given = HiwinProjector(TINY.config).eval(), GivenMaps(TINY.config).eval()
    project.fill_weights(whole, 128)
    given.load_state_dict(whole.state_dict())
    grid, count = (3, 4), 3
    features, pixels = torch.randn(count, 12, 128), torch.randn(count, 12, 3 * 8**2)
    grids = torch.tensor([grid] * count)
    with torch.no_grad():
        given.maps = whole.feature_maps(features, pixels, grid)
        numbers = torch.arange(count).repeat_interleave(12)[:, None].float()
        for form in project.FORMS:
            given.form = whole.form = form
            found = given(torch.zeros(count * 12, 128), grids, numbers)
            expected = whole(features.flatten(0, 1), grids, pixels.flatten(0, 1))
            torch.testing.assert_close(found, expected)


def test_errors_are_seen() -> None:
    with torch.no_grad():
        one = measure(TINY, "fast", 1, 1)
    values, largest = one.samples["output"]
    moved = dataclasses.replace(one, samples={"output": (values + 0.5, largest)})
    assert largest_errors(one, moved)["output"] == pytest.approx(0.5 / largest, rel=1e-5)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scale_list("4,1") == (1, 4)
    for text in ("", "3", "1,1", "1;4"):
        with pytest.raises(argparse.ArgumentTypeError, match="list of scales"):
            scale_list(text)
    for words in (("--views", "0"), ("--width", "100"), ("--repeats", "0")):
        with pytest.raises(UserError, match=words[0]):
            bench(monkeypatch, *words)
