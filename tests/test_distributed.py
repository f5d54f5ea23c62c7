"""Two processes on a CPU: DeepSpeed shares weights out, losses stay those of a single process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from fixtures_runs import run_here, run_on_two, steps, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="needs the extra 'deepspeed'"
    ),
]
SHORT = ("--debug", "--trainer.max_steps", "4", "--trainer.logging_steps", "1")
CASES = {
    # Recipe, DeepSpeed configuration, further options.
    "zero2_uhd_v2": ("uhd_v2/finetune_vicuna7b", "zero2", ()),
    "zero3_uhd_v2_pretrain": ("uhd_v2/pretrain_vicuna7b", "zero3", ()),
    # Texts, tiles, several images and a video, other ones on each rank, under compression.
    "zero3_onevision": (
        "onevision/stage2_ov_qwen2_7b",
        "zero3",
        ("--compression.schedule", "four_stage"),
    ),
    # Without dropout, which each rank draws for itself.
    "zero3_lora": ("llava_1_5/lora_vicuna7b", "zero3", ("--lora.dropout", "0")),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_one_process(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged batches, too: no rank waits for another."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    recipe, deepspeed, options = CASES[name]
    words = [*SHORT, *options, "--deepspeed"]
    alone = run_here(tmp_path, recipe, "alone", *words, "null")
    run_on_two(tmp_path, recipe, *words, deepspeed, "--trainer.output_dir", "two")
    expected, found = steps(alone), steps(tmp_path / "two")
    assert [entry["step"] for entry in found] == [1, 2, 3, 4]
    for one, two in zip(expected, found, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    if "model.safetensors" in {path.name for path in alone.iterdir()}:
        ours, theirs = weights(tmp_path / "two"), weights(alone)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert ours[key].shape == tensor.shape
            # Adam divides by small gradients: those differ in their last digits.
            assert float((ours[key] - tensor).abs().max()) < 2e-3, key
