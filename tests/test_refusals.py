"""Mistakes that are refused in one line before anything is computed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainingArguments

from llava_uhd.checkpoint.assemble import assemble
from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.config.model import (
    CompressionConfig,
    ImageConfig,
    LlavaUHDConfig,
    ProjectorConfig,
    make_config,
)
from llava_uhd.config.training import ModelSection, TrainerConfig
from llava_uhd.data.rows import parse_row
from llava_uhd.errors import UserError
from llava_uhd.images.pixels import open_image
from llava_uhd.images.strategies import plan_image
from llava_uhd.projectors import build_projector
from llava_uhd.train.optimizers import make_schedule


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_slices": 0}, r"image\.max_slices must be at least 1, got 0"),
        ({"long_side": 0}, r"image\.long_side must be at least 1"),
        ({"scale_resolution": 8}, r"image\.scale_resolution 8 must be at least image\.patch_size"),
        ({"mean": [0.5]}, "3 numbers each"),
        ({"std": [0, 1, 1]}, "std above 0"),
    ],
)
def test_image_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image": {"max_slices": "3"}}, r"image\.max_slices must be a whole number, got '3'"),
        ({"projector": {"type": ["a"]}}, r"projector\.type must be a text"),
        ({"select_layer": "last"}, "select_layer must be a whole number"),
    ],
)
def test_types_of_a_configuration(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LlavaUHDConfig(**values)


def test_parts_of_the_library() -> None:
    with pytest.raises(UserError, match="text_config .no_such. is not usable"):
        make_config({"model_type": "no_such"}, "text_config")
    with pytest.raises(UserError, match="text_config .llama. is not usable.*hidden_size"):
        make_config({"model_type": "llama", "hidden_size": "wide"}, "text_config")
    with pytest.raises(UserError, match=r"projector\.num_heads"):
        ProjectorConfig(num_heads=-1)


def test_trainer_settings() -> None:
    with pytest.raises(UserError, match=r"trainer\.output_dir is empty"):
        TrainerConfig(output_dir="")
    with pytest.raises(UserError, match=r"trainer\.learning_rate must not be negative"):
        TrainerConfig(arguments={"learning_rate": -1.0})


@pytest.mark.parametrize(
    ("key", "wrong", "right", "message"),
    [
        ("max_steps", (0, -5), (1, -1), "at least 1, or -1 for no bound"),
        ("num_train_epochs", (0, -1.0), (0.5,), "above 0"),
        ("logging_steps", (0, -1), (1, 0.1), "above 0"),
        ("save_steps", (0, -3), (1, 0.1), r"above 0 \(--trainer.save_strategy no"),
        ("eval_steps", (0,), (1, None), "above 0"),
        ("save_total_limit", (0, -1), (1, None), "at least 1, or null"),
        ("weight_decay", (-0.1,), (0, 0.1), "at least 0"),
        ("max_grad_norm", (-1,), (0, 1.0, None), "at least 0"),
        ("warmup_steps", (-3,), (0, 0.03), "at least 0"),
        ("adam_beta2", (-0.1, 1, 2), (0.999,), "at least 0 and below 1"),
        ("dataloader_num_workers", (-1,), (0, 4), "at least 0"),
        ("seed", (-1, 2**32), (0, 2**32 - 1), "at least 0 and below 2"),
    ],
)
def test_values_that_the_library_misreads(
    key: str, wrong: tuple[Any, ...], right: tuple[Any, ...], message: str
) -> None:
    for value in wrong:
        with pytest.raises(UserError, match=rf"^trainer\.{key} must be {message}.*, got {value}$"):
            TrainerConfig(arguments={key: value})
    for value in right:
        assert TrainerConfig(arguments={key: value}).arguments[key] == value


@pytest.mark.parametrize(("warmup", "told"), [(8, True), (7, False), (0.5, False)])
def test_a_warm_up_longer_than_the_run_is_told(
    warmup: float, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, warmup_steps=warmup, lr_scheduler_type="cosine"
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    make_schedule(arguments, optimizer, 8)
    assert ("8 steps of warm-up in a run of 8" in caplog.text) is told


def test_where_a_run_goes_on_is_its_output_folder() -> None:
    with pytest.raises(UserError, match=r"resume_from_checkpoint: a run goes on .* by itself"):
        TrainerConfig(arguments={"resume_from_checkpoint": "checkpoints/old"})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"projector": ProjectorConfig(num_queries=81)}, r"model\.projector\.num_queries is 81"),
        ({"select_layer": -1}, r"model\.select_layer is -1, but checkpoint"),
    ],
)
def test_a_checkpoint_keeps_its_shapes(
    section: dict[str, Any], message: str, tiny_checkpoint: Path
) -> None:
    with pytest.raises(UserError, match=message):
        assemble(
            ModelSection(checkpoint=str(tiny_checkpoint), **section),
            CompressionConfig(),
            torch.float32,
        )


def test_unknown_compression() -> None:
    with pytest.raises(UserError, match="unknown compressor 'pool'"):
        assemble(ModelSection(checkpoint="x"), CompressionConfig("pool"), torch.float32)


def test_loading_options(tiny_checkpoint: Path) -> None:
    with pytest.raises(UserError, match="attn_implementation 'nope'"):
        load_pretrained(tiny_checkpoint, attn_implementation="nope")
    with pytest.raises(UserError, match="device 'cuda:9'"):
        load_pretrained(tiny_checkpoint, device="cuda:9")


def test_generation_settings_of_a_checkpoint_are_read(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"num_beams": 3, "eos_token_id": [2, 5], "temperature": 0.9}))
    model, _ = load_pretrained(folder)
    assert model.generation_config.num_beams == 3
    assert model.generation_config.eos_token_id == [2, 5]
    assert model.generation_config.temperature is None  # greedy
    file.write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json is not valid JSON"):
        load_pretrained(folder)


def test_any_failure_of_the_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable(Exception):
        """Of no kind that this package knows, like those of the hub's network library."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise Unreachable("no route\nand more")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"neither a local folder nor reachable.*no route\)"):
        load_pretrained("someone/model")


@pytest.mark.parametrize("place", ["image", "value"])
def test_half_characters(place: str) -> None:
    texts = {"image": "a.png", "value": "What?", place: "broken \ud83d"}
    row = {
        "image": texts["image"],
        "conversations": [
            {"from": "human", "value": "<image>\n" + texts["value"]},
            {"from": "gpt", "value": "a"},
        ],
    }
    with pytest.raises(UserError, match="not valid Unicode"):
        parse_row(row)


def test_images_of_other_kinds() -> None:
    for source in (np.zeros((4, 4, 3), np.uint8), None):
        with pytest.raises(UserError, match="must be a path, encoded bytes or a PIL image"):
            open_image(source)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot be opened"):
        open_image("a" * 5000)
    with pytest.raises(UserError, match="image size must be positive"):
        plan_image(ImageConfig(), *Image.new("RGB", (0, 5)).size)
    with pytest.raises(UserError, match="height and width must be > 0"):
        plan_image(ImageConfig(long_side=1024), 3000, 1)


@pytest.mark.parametrize("module", ["llava_uhd.train.demo_tower", "llava_uhd.data.synthetic"])
def test_output_that_cannot_be_made(module: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    words = [sys.executable, "-m", module, "--out", str(file / "folder")]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2
    assert ran.stderr.strip().endswith("cannot be made: Not a directory")


def test_heads_that_do_not_divide_the_width() -> None:
    config = LlavaUHDConfig(
        vision_config={"model_type": "clip_vision_model"},
        text_config={"model_type": "llama", "hidden_size": 64, "num_attention_heads": 2},
        projector={"num_heads": 7},
    )
    with pytest.raises(UserError, match=r"num_heads: the width 64 must be divisible by 7"):
        build_projector(config)
