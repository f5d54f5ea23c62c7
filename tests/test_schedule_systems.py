"""Four stages of compression in every other system, by the real command, in one process."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
from fixtures_runs import FROM_NOTHING, Train, steps

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.config.compression import CompressionConfig
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.train.log import read_log

Seen = list[tuple[int, int, list[list[tuple[int, int]]]]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Layer, stride and (length, columns) of the runs of each row, of every forward pass."""
    original = LlavaUHDForConditionalGeneration._decode
    found: Seen = []

    @functools.wraps(original)
    def decode(self: Any, embeds: Any, labels: Any, runs: Any, compression: Any, *rest: Any) -> Any:
        rows = (
            [] if runs is None else [[tuple(r[1:]) for r in row if r[1]] for row in runs.tolist()]
        )
        found.append((compression.layer, compression.stride, rows))
        return original(self, embeds, labels, runs, compression, *rest)

    monkeypatch.setattr(LlavaUHDForConditionalGeneration, "_decode", decode)
    return found


def check_run(folder: Any, seen: Seen) -> None:
    """Stages in the log and in what the model is told; the result is uncompressed and learned."""
    entries = steps(folder)
    assert [entry["compression_stride"] for entry in entries] == [8, 2, 2, 1]
    stages = [e["compression_stage"] for e in read_log(folder) if "compression_stage" in e]
    assert stages == [1, 2, 3, 4]
    assert all(math.isfinite(entry["loss"]) and entry["loss"] > 0 for entry in entries)
    assert [pair for pair in dict.fromkeys((k, s) for k, s, _ in seen)] == [(1, 8), (1, 2), (-1, 1)]
    model, _ = load_pretrained(folder)
    assert model.config.compression == CompressionConfig()


WORDS = ("--debug", "--compression.schedule", "four_stage", "--trainer.max_steps", "4")


@pytest.mark.slow
def test_onevision(train: Train, seen: Seen) -> None:
    """Tiles with learned newlines, several images, videos and texts, as in the last stage."""
    folder = train("onevision/stage2_ov_qwen2_7b", "out/onevision", *WORDS)
    check_run(folder, seen)
    rows = [row for _, stride, batch in seen if stride > 1 for row in batch]
    runs = [run for row in rows for run in row]
    assert any(not row for row in rows), "a text alone"
    assert (1, 0) in runs, "newlines, which nothing shortens"
    # The joined map of tiles is cut into its rows, each before its newline.
    assert any(row.count((1, 0)) > 2 and len(row) > 5 for row in rows)
    # Frames are pooled maps, and several images or frames give several maps in a row.
    assert any(sum(length > 1 and length != columns for length, columns in row) > 1 for row in rows)
    assert len({tuple(row) for row in rows}) >= 4, "rows of different make-up"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen2_7b", "vicuna7b"])
def test_uhd_v2(train: Train, seen: Seen, model: str) -> None:
    """Slices behind the high-resolution window transformer; for Vicuna-7B joined, row by row."""
    folder = train(f"uhd_v2/finetune_{model}", f"out/uhd_v2_{model}", *WORDS, *FROM_NOTHING)
    check_run(folder, seen)
    rows = [row for _, stride, batch in seen if stride > 1 for row in batch]
    assert all(rows) and any(len(row) > 1 for row in rows), "more views than the overview"
    in_rows = [run for row in rows for run in row if run[0] == run[1]]
    assert bool(in_rows) == (model == "vicuna7b"), "rows of the joined map"
