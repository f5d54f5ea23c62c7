"""Training from folders on disk, as a lab does: projector first, then the whole model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fixtures_runs import (
    FROM_NOTHING,
    Train,
    weights,
)
from fixtures_tiny import LLAMA, VISION
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.manifest import read_manifest
from llava_uhd.data.demo_tokenizer import build_demo_tokenizer
from llava_uhd.errors import UserError


@pytest.fixture(scope="module")
def folders(workplace: Path) -> Path:
    """A language model and a tower as transformers writes them."""
    tokenizer = build_demo_tokenizer()
    torch.manual_seed(0)
    values = {key: value for key, value in LLAMA.items() if key != "model_type"}
    language = LlamaForCausalLM(LlamaConfig(**values, vocab_size=len(tokenizer)))
    language.generation_config.temperature, language.generation_config.top_p = 0.9, 0.6
    language.generation_config.do_sample = True
    language.save_pretrained(workplace / "language")
    # Vicuna's contradiction.
    file = workplace / "language/generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_sample": False}))
    tokenizer.save_pretrained(workplace / "language")
    values = {key: value for key, value in VISION.items() if key != "model_type"}
    CLIPVisionModel(CLIPVisionConfig(**values)).save_pretrained(workplace / "tower")
    return workplace


LAB = ("--model.language_model", "language", "--model.vision_tower", "tower")


def test_projector_then_model(train: Train, folders: Path) -> None:
    words = ("--trainer.max_steps", "2", "--trainer.warmup_steps", "0")
    stage1 = train("debug/pretrain", "out/stage1", *LAB, *words)
    assert not (stage1 / "model.safetensors").exists()
    assert read_manifest(stage1)["kind"] == "projector"
    projector = load_file(stage1 / "projector.safetensors")
    kept = load_file(stage1 / "checkpoint-2/trainable.safetensors")
    assert set(kept) == {f"projector.{name}" for name in projector}

    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folders)
        model, processor = load_pretrained(stage1)
    assert all(torch.equal(projector[k], v) for k, v in model.projector.state_dict().items())
    tower = load_file(folders / "tower/model.safetensors")
    found = model.vision_tower.state_dict()
    assert torch.equal(
        found["layers.0.mlp.fc1.weight"], tower["encoder.layers.0.mlp.fc1.weight"]
    ) or torch.equal(
        found["layers.0.mlp.fc1.weight"], tower["vision_model.encoder.layers.0.mlp.fc1.weight"]
    )
    assert processor.template_name == "plain"

    still = ("--trainer.learning_rate", "0", "--model.projector_file", "out/stage1")
    stage2 = train("debug/finetune", "out/stage2", *LAB, *words, *still)
    state = weights(stage2)
    assert all(torch.equal(state[f"projector.{name}"], projector[name]) for name in projector)
    model, processor = load_pretrained(stage2)
    assert processor.template_name == "v1" and not model.generation_config.do_sample
    assert not model.config.projector.train_positions

    more = train(
        "debug/finetune", "out/stage3", *words, "--model.checkpoint", "out/stage2",
        "--trainer.learning_rate", "0", "--model.image.max_slices", "3",
    )  # fmt: skip
    again, processor = load_pretrained(more)
    assert all(torch.equal(state[name], tensor) for name, tensor in weights(more).items())
    assert again.config.image.max_slices == processor.image_config.max_slices == 3
    assert again.config.image.scale_resolution == 64


def test_checkpoint_with_another_projector(train: Train, folders: Path) -> None:
    words = ("--trainer.max_steps", "1", "--trainer.learning_rate", "0")
    whole = train("debug/finetune", "out/whole", *LAB, *words, *FROM_NOTHING)
    other = train("debug/pretrain", "out/other", *LAB, *words, "--trainer.seed", "7")
    given = ("--model.checkpoint", "out/whole", "--model.projector_file", "out/other")
    state = weights(train("debug/finetune", "out/joined", *words, *given))
    projector = load_file(other / "projector.safetensors")
    for name, tensor in weights(whole).items():
        part, _, rest = name.partition(".")
        expected = projector[rest] if part == "projector" else tensor
        assert torch.equal(state[name], expected), name
    assert not torch.equal(weights(whole)["projector.query"], projector["query"])


def test_a_projector_for_another_model_is_refused(train: Train, folders: Path) -> None:
    words = ("--trainer.max_steps", "1")
    train("debug/pretrain", "out/narrow", *LAB, *words, "--model.projector.num_queries", "9")
    with pytest.raises(UserError, match=r"num_queries 9 \(the model has 16\): set the model to"):
        train("debug/finetune", "out/wide", *LAB, *words, "--model.projector_file", "out/narrow")
