"""Held-out samples on two processes: other numbers of batches, other kinds of samples on each."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from fixtures_runs import run_here, run_on_two, steps

from llava_uhd.train.heldout_page import read_answers
from llava_uhd.train.log import read_log

pytestmark = pytest.mark.slow

# Of texts, images and videos eight samples are held out: three batches, two processes.
WORDS = (
    *("--debug", "--trainer.max_steps", "4", "--trainer.logging_steps", "1"),
    *("--trainer.eval_steps", "2", "--data.holdout", "8"),
    *("--trainer.per_device_eval_batch_size", "3"),
)


@pytest.mark.parametrize("deepspeed", ["null", "zero2", "zero3"])
def test_losses_are_those_of_one_process(
    deepspeed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if deepspeed != "null" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs the extra 'deepspeed'")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    recipe = "onevision/stage2_ov_qwen2_7b"
    alone = run_here(tmp_path, recipe, "alone", *WORDS, "--deepspeed", "null")
    output = ("--trainer.output_dir", "two")
    run_on_two(tmp_path, recipe, *WORDS, "--deepspeed", deepspeed, *output)
    two = tmp_path / "two"
    for one, other in zip(steps(alone), steps(two), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)
    held = [[e for e in read_log(folder) if "eval_loss" in e] for folder in (alone, two)]
    assert [entry["step"] for entry in held[1]] == [2, 4]
    for one, other in zip(*held, strict=True):
        assert other["eval_loss"] == pytest.approx(one["eval_loss"], abs=1e-4)
    wanted, found = read_answers(alone)[0]["answers"], read_answers(two)[0]["answers"]
    assert len(found) == 4 and [a["where"] for a in found] == [a["where"] for a in wanted]
    assert all(answer["generated"] for answer in found)
