"""``bench loss``: forms side by side, each in a process of its own."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from llava_uhd.bench import loss as bench
from llava_uhd.bench.__main__ import make_parser
from llava_uhd.errors import UserError

TINY = ("--rows", "40", "--vocabulary", "300", "--hidden", "16", "--repeats", "1")


def options(*words: str) -> Namespace:
    return make_parser().parse_args(["loss", *words])


@pytest.mark.slow
def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert bench.run(options(*TINY, "--json", str(file))) == 0
    printed = capsys.readouterr().out
    assert "40 learned tokens, 300 words, width 16, float32, the head learns" in printed
    assert {line.split()[0] for line in printed.splitlines() if line.split()} >= {
        "whole",
        "chunked",
    }
    found = json.loads(file.read_text())
    assert [row["name"] for row in found["rows"]] == ["whole", "chunked"]
    assert all(row["best_s"] > 0 for row in found["rows"])
    assert found["estimates"]["whole"] == 40 * 300 * 12 + 300 * 16 * 4
    assert found["estimates"]["chunked"] == 10 * 300 * 12 + 300 * 16 * 4


def test_forms_are_compared() -> None:
    """Loss and gradients of states and head, as large as each other."""
    task = bench.Task(40, 300, 16)
    variant = bench.make(task, "chunked")
    found = variant.common(variant.run())
    assert found.shape == (1 + 41 * 16 + 300 * 16,)
    parts = [found[:1], found[1 : 1 + 41 * 16], found[1 + 41 * 16 :]]
    assert all(0.1 < float(part.abs().max()) < 20 for part in parts)
    frozen = bench.make(bench.Task(40, 300, 16, frozen=True), "whole")
    assert frozen.common(frozen.run()).shape == (1 + 41 * 16,)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, message in (
        (("--rows", "0"), "--rows must be at least 1, got 0"),
        (("--compare", "whole,half"), "name some of whole, chunked, auto, liger, each once"),
        (("--compare", "whole,whole"), "each once"),
        (("--compare", "whole,liger"), "needs --device cuda and the package liger-kernel"),
    ):
        with pytest.raises(UserError, match=message):
            bench.check(options(*words))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="this machine has no CUDA device"):
        bench.check(options("--device", "cuda"))
    assert bench.check(options(*TINY, "--frozen-head"))[0] == bench.Task(40, 300, 16, True)
