"""``bench upsample``: the plain forms are the original, the command compares, processes measure."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_alone import fill
from safetensors.torch import load_file

from llava_uhd.bench import plain_upsample, upsample
from llava_uhd.bench.__main__ import main
from llava_uhd.bench.alone import Alone, compare_alone, peak_process_bytes
from llava_uhd.errors import UserError
from llava_uhd.vision.upsampler import UpsamplerStack


@pytest.mark.parametrize("form", plain_upsample.CONVOLUTIONS)
def test_plain_forms_equal_the_original(golden: Path, form: str) -> None:
    tensors = load_file(golden / "uhd_v2/jbu_4x.safetensors")
    stack = UpsamplerStack(24, 4)
    stack.load_state_dict({key[2:]: each for key, each in tensors.items() if key[:2] == "w."})
    convolution = plain_upsample.CONVOLUTIONS[form]
    with torch.no_grad():
        maps = plain_upsample.run_stack(
            stack.eval(), tensors["source"], tensors["guidance"], convolution
        )
    for scale, value in maps.items():
        expected = tensors[f"internal.feat{scale}x"]
        torch.testing.assert_close(value, expected, atol=2e-5, rtol=1e-4)


def bench(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", "upsample", *words])
    return main()


def test_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    words = ("--map", "7x6", "--width", "48", "--repeats", "2", "--device", "cpu", "--together")
    assert bench(monkeypatch, *words, "--json", str(file)) == 0
    assert "whole stack, 6x7 -> 24x28" in capsys.readouterr().out
    figures = json.loads(file.read_text())
    assert figures["passed"] and figures["map"] == [6, 7]
    rows = {each["title"]: each["rows"] for each in figures["comparisons"]}
    assert [title.partition(",")[0] for title in rows] == [
        "bicubic",
        "the same with its gradients",
        "bicubic",
        "kernels of the last stage",
        "whole stack",
    ]
    plain, shifts, ours = rows["whole stack, 6x7 -> 24x28"]
    assert [plain["name"], shifts["name"], ours["name"]] == [
        "unfold, multiply, sum",
        "sum of 49 shifts",
        "ours",
    ]
    assert plain["peak_bytes"] > 8 * ours["peak_bytes"] > 0
    monkeypatch.setitem(upsample.ERROR_BOUNDS, "float32", 0.0)
    assert bench(monkeypatch, *words) == 1
    assert "FAILED: whole stack" in capsys.readouterr().out


@pytest.mark.parametrize("scale", [2, 8])
def test_other_stacks(scale: int) -> None:
    task = upsample.Task("stack", (4, 4), 8, scale)
    forms = upsample.cpu_forms(task)
    results = []
    for form in forms:
        variant = upsample.make_variant(task, form)
        results.append(variant.common(variant.run()))
    for each in results[1:]:
        torch.testing.assert_close(each, results[0], atol=1e-5, rtol=1e-5)


def test_forms_of_the_gpu_run_compute_the_same() -> None:
    """Here on a CPU: what is compared there, in both dtypes."""
    for dtype, bound in upsample.ERROR_BOUNDS.items():
        task = upsample.Task("convolution", (4, 5), 8, dtype=dtype)
        forms = (upsample.EXACT, upsample.UNFOLD, upsample.SHIFTS, upsample.TILES, upsample.OURS)
        exact, *others = (upsample.make_variant(task, form) for form in forms)
        expected = exact.common(exact.run())
        for other in others:
            found = other.common(other.run())
            assert found.shape == expected.shape and found.dtype == getattr(torch, dtype)
            assert (found - expected).abs().max() <= bound * expected.abs().max()


def test_gpu_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, but on a CPU."""
    monkeypatch.setattr(upsample, "memory_speed", lambda device: 1e9)
    monkeypatch.setattr(upsample, "GPU_LOOPS", 2)
    found = upsample.compare_on_gpu(upsample.Task("convolution", (4, 5), 8), 1, 1)
    kinds = [(kind, dtype) for kind, _, dtype in found]
    assert kinds.count(("convolution", "float32")) == kinds.count(("convolution", "bfloat16")) == 2
    assert kinds.count(("stack", "float32")) == 1 and ("stack", "bfloat16") not in kinds
    for (_, _, dtype), comparison in found.items():
        assert comparison.worst_error <= upsample.ERROR_BOUNDS[dtype], comparison.title
    first = next(iter(found.values()))
    assert first.title.endswith("float32, at least 18,880 bytes in 0.0189 ms")
    assert [row.name for row in first.rows][-2:] == ["ours without the GPU kernels", "ours"]


def test_least_traffic() -> None:
    """2.4 + 9.4 + 37.7 MB of maps, 1.4 of the image, 4.2 of weights."""
    task = upsample.Task("stack", (24, 24), 1024)
    assert task.least_bytes == pytest.approx(55e6, rel=0.01)
    task = upsample.Task("convolution", (48, 48), 1024, dtype="bfloat16")
    assert task.least_bytes == (5 * 48 * 48 * 1024 + 96 * 96 * 49) * 2


def test_bad_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (("--width", "0"), ("--map", "1x8"), ("--device", "cuda"), ("--repeats", "0")):
        with pytest.raises(UserError):
            bench(monkeypatch, *words)


def test_a_process_for_each_form() -> None:
    jobs = [Alone("filling", 40, 1, ("long", "short")), Alone("once", 20, 1, ("long",))]
    filling, once = compare_alone(fill, jobs, repeats=2, threads=1)
    assert [row.name for row in filling.rows] == ["long", "short"]
    assert [row.name for row in once.rows] == ["long"]
    long, short = filling.rows
    assert filling.worst_error == 0 and long.best_s > 0
    if sys.platform == "linux":
        assert long.peak_bytes == pytest.approx(160 * 2**20, rel=0.1)
        assert short.peak_bytes == pytest.approx(40 * 2**20, rel=0.1)
        assert once.rows[0].peak_bytes == pytest.approx(80 * 2**20, rel=0.1)


def test_peak_of_this_process() -> None:
    """Memory that was freed before, or that is freed again, counts as what it was."""
    made: list[Any] = [np.ones(2**22)]
    made.clear()
    peak = peak_process_bytes(lambda: [np.ones(2**22).sum() for _ in range(3)])
    if sys.platform == "linux":
        assert peak == pytest.approx(2**25, rel=0.2)
