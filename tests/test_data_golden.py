"""From the data file to the loss, against the published code."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.config.training import DataConfig
from llava_uhd.data.collator import Collator
from llava_uhd.data.dataset import BrokenSample, build_dataset
from llava_uhd.text.processor import LlavaUHDProcessor


@pytest.fixture(scope="module")
def source(golden: Path) -> Path:
    return golden / "uhd_v1"


@pytest.fixture(scope="module")
def parts(source: Path) -> tuple[Any, LlavaUHDProcessor]:
    return load_pretrained(str(source / "tiny_checkpoint"), dtype=torch.float32)


def batch_of(
    source: Path, processor: LlavaUHDProcessor, file: str, indices: list[int], **options: bool
) -> dict[str, torch.Tensor]:
    config = DataConfig(path=str(source / file), image_folder=str(source / "images"), **options)  # type: ignore[arg-type]
    dataset = build_dataset(config, processor)
    return Collator(processor.tokenizer.pad_token_id or 0)([dataset[i] for i in indices])


def collapse(
    row: torch.Tensor, labels: torch.Tensor, placeholder: int
) -> tuple[list[int], list[int]]:
    """Each image as one -200, as the published collator writes it."""
    ids: list[int] = []
    kept: list[int] = []
    places = (row == placeholder).nonzero().flatten().tolist()
    first, last = (places[0], places[-1]) if places else (-1, -1)
    for place, (token, label) in enumerate(zip(row.tolist(), labels.tolist(), strict=True)):
        if first < place <= last:
            assert label == -100
            continue
        ids.append(-200 if place == first else token)
        kept.append(label)
    return ids, kept


@pytest.mark.parametrize(
    ("case", "file", "indices"),
    [
        ("sft_batch3", "train_samples.json", [0, 1, 2]),
        ("sft_single_0", "train_samples.json", [0]),
        ("sft_single_1", "train_samples.json", [1]),
        ("sft_single_2", "train_samples.json", [2]),
        ("pretrain_plain", "pretrain_samples.json", [0]),
    ],
)
def test_batches_and_losses_are_the_published_ones(
    source: Path,
    parts: tuple[Any, LlavaUHDProcessor],
    case: str,
    file: str,
    indices: list[int],
) -> None:
    model, processor = parts
    wanted = json.loads((source / "tiny_cases.json").read_text())["train"][case]
    options = {}
    if case == "pretrain_plain":
        processor = LlavaUHDProcessor(
            processor.tokenizer,
            dataclasses.asdict(processor.image_config),
            dataclasses.asdict(processor.projector_config),
            template_name="plain",
        )
        options = {"overview_only": True}
    batch = batch_of(source, processor, file, indices, **options)
    placeholder = processor.image_token_id
    assert placeholder is not None
    for row in range(len(indices)):
        length = int(batch["attention_mask"][row].sum())
        ids, labels = collapse(
            batch["input_ids"][row, :length], batch["labels"][row, :length], placeholder
        )
        real = sum(wanted["attention_mask"][row])
        assert ids == wanted["input_ids"][row][:real]
        assert labels == wanted["labels"][row][:real]
        learned = (batch["labels"][row] != -100).nonzero().flatten().tolist()
        assert learned == wanted["expanded_supervised_positions"][row]
        assert length == wanted["expanded_attention_sum"][row]
    with torch.no_grad():
        loss = model(**batch).loss
    assert float(loss) == pytest.approx(wanted["loss"], rel=1e-4, abs=1e-4)


def test_batch_without_a_sample_trains_harmlessly(parts: tuple[Any, LlavaUHDProcessor]) -> None:
    model, processor = parts
    batch = Collator(processor.tokenizer.pad_token_id or 0)([BrokenSample("x", "y")])
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=torch.tensor(0)).loss
    loss.backward()
    assert float(loss.detach()) == 0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(float(each.abs().max()) == 0 for each in gradients)
