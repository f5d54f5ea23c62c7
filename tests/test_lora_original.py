"""LoRA over a checkpoint in a published layout, from training to what other tools read."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from fixtures_model import call
from fixtures_tiny import picture

from llava_uhd.checkpoint.load import load_pretrained

WORDS = ("--data.path", "data.json", "--data.image_folder", ".", "--trainer.output_dir", "out")
STEPS = ("--trainer.max_steps", "2", "--trainer.global_batch_size", "2", "--lora.r", "4")
STEPS += ("--lora.alpha", "8", "--trainer.dataloader_num_workers", "0", "--trainer.warmup_steps")
STEPS += ("0", "--trainer.learning_rate", "1e-2", "--trainer.logging_steps", "1")


def write(folder: Path, answers: list[str]) -> None:
    """A picture, and as many samples about it as there are answers."""
    picture(60, 40).save(folder / "a.png")
    rows = [
        {
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": answer},
            ],
        }
        for answer in answers
    ]
    (folder / "data.json").write_text(json.dumps(rows))


def logits(folder: Path | str, **options: object) -> torch.Tensor:
    model, processor = load_pretrained(folder, **options)  # type: ignore[arg-type]
    inputs = processor(text="USER: <image>\nWhat? ASSISTANT:", images=[picture(80, 50)])
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits[0, -1]
    return found


def test_trained_loaded_merged_converted(golden: Path, tmp_path: Path) -> None:
    """Every step as a user types it; the answers stay the same."""
    base = golden / "llava_1_5/model/checkpoint"
    write(tmp_path, ["red sign", "blue", "green", "yellow"])
    train = ("llava_uhd.train", "llava_1_5/task_lora", "--model.checkpoint", base)
    status, out, error = call(*train, *WORDS, *STEPS, cwd=tmp_path)
    assert status == 0, error
    assert "[[ red sign</s>]]" in out
    beside = logits(tmp_path / "out", merge_lora=False)
    named = logits(tmp_path / "out", base=base)
    assert (beside - logits(base)).abs().max() > 1e-2, "something was learned"
    status, _, error = call("llava_uhd.merge_lora", "out", "--out", "merged", cwd=tmp_path)
    assert status == 0, error
    for other in (named, logits(tmp_path / "merged")):
        assert (beside - other).abs().max() <= 1e-5
    for target in ("original", "transformers"):
        words = ("llava_uhd.convert", "merged", target, "--to", target)
        status, out, error = call(*words, cwd=tmp_path)
        assert status == 0 and "checked: logits differ" in out, error
        # The layout of transformers has rows for the placeholders behind the vocabulary.
        assert (beside - logits(tmp_path / target)[: len(beside)]).abs().max() <= 1e-5
