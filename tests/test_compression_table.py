"""The table of a batch against the slow form that goes from token to token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_uhd.config.model import CompressionConfig
from llava_uhd.language.compression import build_map
from llava_uhd.language.compressors import COMPRESSORS, Compressor
from llava_uhd.language.runs import Run, place_runs

RUNS = st.builds(
    lambda rows, columns, map_: Run(rows * columns, columns if map_ else 0),
    st.integers(1, 4),
    st.integers(1, 5),
    st.booleans(),
)
# Text (a number of tokens) and runs of a row.
ROWS = st.lists(
    st.lists(st.one_of(st.integers(1, 4), RUNS), min_size=1, max_size=6), min_size=1, max_size=4
)


def slow_row(
    config: CompressionConfig, row: list[Any], scores: torch.Tensor
) -> tuple[list[int], list[bool], int]:
    """New place of every token of a row, whether it was merged, and how many places there are."""
    places: list[int] = []
    merged: list[bool] = []
    count = 0
    for each in row:
        if not isinstance(each, Run):
            places += range(count, count + each)
            merged += [False] * each
            count += each
            continue
        groups = [0]
        if each.length > 1:
            own = scores[len(places) : len(places) + each.length]
            rule = COMPRESSORS.get(config.method).groups
            groups = rule(each, config.stride, config.remainder == "keep", own).tolist()
        places += [count + group if group >= 0 else -1 for group in groups]
        merged += [each.length > 1 and config.stride > 1] * each.length
        count += max(groups) + 1
    return places, merged, count


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=ROWS,
    method=st.sampled_from(["avgpool1d", "avgpool2d", "fastv"]),
    stride=st.sampled_from([1, 4, 9]),
    remainder=st.sampled_from(["keep", "drop"]),
    left=st.booleans(),
)
def test_table(rows: Any, method: str, stride: int, remainder: str, left: bool) -> None:
    config = CompressionConfig(method, 1, stride, remainder)  # type: ignore[arg-type]
    lengths = [sum(x.length if isinstance(x, Run) else x for x in row) for row in rows]
    width = max(*lengths, 1) + 1
    valid, visual = torch.zeros(2, len(rows), width, dtype=torch.bool)
    scores = torch.rand(len(rows), width, generator=torch.Generator().manual_seed(0))
    starts = [width - length if left else 0 for length in lengths]
    for index, row in enumerate(rows):
        at = starts[index]
        valid[index, at : at + lengths[index]] = True
        for each in row:
            step = each.length if isinstance(each, Run) else each
            visual[index, at : at + step] = isinstance(each, Run)
            at += step
    runs = place_runs(visual, [x for row in rows for x in row if isinstance(x, Run)])
    table = build_map(config, runs, valid, scores)
    expected = [
        slow_row(config, row, scores[index, starts[index] :]) for index, row in enumerate(rows)
    ]
    longest = max(count for _, _, count in expected)
    assert table.mask.shape[1] == longest
    for index, (places, merged, count) in enumerate(expected):
        here = slice(starts[index], starts[index] + lengths[index])
        shift = longest - count if left else 0
        assert table.new_index[index, here].tolist() == [
            p + shift if p >= 0 else -1 for p in places
        ]
        assert table.visual[index, here].tolist() == merged
        assert table.mask[index].tolist() == [shift <= p < shift + count for p in range(longest)]
    assert not table.visual[~valid].any() and bool((table.new_index[~valid] == -1).all())


def test_runs_alike_are_cut_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a generation asks anew; a video has hundreds of runs."""
    calls: list[Run] = []

    def rule(run: Run, stride: int, keep: bool, scores: torch.Tensor | None = None) -> torch.Tensor:
        calls.append(run)
        return torch.arange(run.length) // stride

    monkeypatch.setitem(COMPRESSORS._items, "counted", Compressor(rule))
    runs = [Run(14, 14), Run(1)] * 40 + [Run(9, 3)]
    visual = torch.ones(1, sum(run.length for run in runs), dtype=torch.bool)
    table = build_map(CompressionConfig("counted", 1, 8), place_runs(visual, runs), visual)
    assert table.mask.shape[1] == 40 * 3 + 2
    assert calls == [Run(14, 14), Run(9, 3)]
