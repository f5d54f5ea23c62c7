"""Training with adapters: what learns, what is written, going on, quantised weights below."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_checkpoint import logits, save
from fixtures_lora import LANGUAGES
from fixtures_runs import FROM_NOTHING, Train, break_at, run_here, steps
from fixtures_tiny import LLAMA, picture, tiny_parts
from safetensors.torch import load_file

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.lora_merge import merge_folder
from llava_uhd.checkpoint.manifest import read_manifest
from llava_uhd.checkpoint.quantize import Quantization
from llava_uhd.config.lora import LoraSection
from llava_uhd.config.recipe import load_recipe
from llava_uhd.config.training import StageConfig
from llava_uhd.errors import UserError
from llava_uhd.train.lora import add_adapters, finish_adapters, storage, use_masters
from llava_uhd.train.setup import training_arguments
from llava_uhd.train.stages import apply_stage
from llava_uhd.train.trainer import StageTrainer

pytest.importorskip("peft")

CLOSE = 1e-5
LORA = (
    *FROM_NOTHING, "--lora.r", "4", "--learning_rate", "1e-2", "--trainer.max_steps", "3",
    "--trainer.save_steps", "2", "--trainer.gradient_checkpointing", "true",
)  # fmt: skip


def difference(first: Any, second: Any) -> float:
    return float((logits(*first) - logits(*second)).abs().max())


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Model and processor of each run that ends, as they were trained."""
    models: list[Any] = []
    original = StageTrainer.finish

    def finish(self: StageTrainer) -> None:
        models.append((self.model.eval(), self.processing_class))
        original(self)

    monkeypatch.setattr(StageTrainer, "finish", finish)
    return models


# The four-bit kernel for CPUs takes rows of whole blocks of 64.
WHOLE_BLOCKS = {**LLAMA, "intermediate_size": 128}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model to train adapters on."""
    return save(tmp_path_factory.mktemp("checkpoint") / "model", tiny_parts(WHOLE_BLOCKS))


# --- runs -----------------------------------------------------------------------------------------


def test_run_on_a_checkpoint(
    train: Train, checkpoint: Path, caught: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model.checkpoint", str(checkpoint), "--mm_projector_lr", "1e-3")
    out = train("debug/finetune", "out/on_checkpoint", *LORA, *words)
    table = capsys.readouterr().out
    assert "language_model (LoRA)" in table and "0.01" in table and "0.001" in table
    facts = read_manifest(out)
    assert (facts["kind"], facts["checkpoint"], facts["steps"]) == ("lora", str(checkpoint), 3)
    assert not (out / "model.safetensors").exists()
    learned = load_file(out / "non_lora_trainables.safetensors")
    assert {key.partition(".")[0] for key in learned} == {"projector"}
    base = load_pretrained(checkpoint)
    assert difference(caught[0], base) > 0.05, "three steps must matter"
    assert difference(caught[0], load_pretrained(out, merge_lora=False)) <= CLOSE
    loaded = load_pretrained(out)
    assert difference(caught[0], loaded) <= CLOSE
    for name, parameter in base[0].named_parameters():
        touched = not torch.equal(parameter, loaded[0].get_parameter(name))
        assert touched == (
            (name.startswith("projector.") and name != "projector.pos_embed")
            or (name.endswith("_proj.weight") and name.startswith("language_model."))
        ), name  # fmt: skip
    merge_folder(out, out / "whole")
    assert difference(caught[0], load_pretrained(out / "whole")) <= CLOSE
    values = load_file(out / "checkpoint-3/trainable.safetensors")
    assert values.keys() == {name for name, p in caught[0][0].named_parameters() if p.requires_grad}
    assert {key.partition(".")[0] for key in values} == {"projector", "language_model"}


def test_parts_that_learn_whole_beside_adapters(
    train: Train, checkpoint: Path, caught: list[Any]
) -> None:
    words = ("--model.checkpoint", str(checkpoint), "--stage.learn.vision_tower", "1e-2")
    out = train("debug/finetune", "out/tower", *LORA, *words)
    learned = load_file(out / "non_lora_trainables.safetensors")
    assert {key.partition(".")[0] for key in learned} == {"projector", "vision_tower"}
    before, _ = load_pretrained(checkpoint)
    loaded = load_pretrained(out)
    name = "vision_tower.layers.0.mlp.fc1.weight"
    assert not torch.equal(before.get_parameter(name), loaded[0].get_parameter(name))
    assert difference(caught[0], loaded) <= CLOSE


@pytest.mark.parametrize("kind", LANGUAGES)
def test_run_from_nothing(train: Train, caught: list[Any], kind: str) -> None:
    """A model without a base on disk lies whole in its folder."""
    words = ("--model.language_model", json.dumps(LANGUAGES[kind]), "--lora.dora", "true")
    out = train("debug/finetune", f"out/nothing_{kind}", *LORA, *words)
    loaded = load_pretrained(out)
    assert difference(caught[0], loaded) <= CLOSE
    again = load_pretrained(out, merge_lora=False)
    assert difference(caught[0], again) <= CLOSE


def test_going_on(train: Train, workplace: Path, checkpoint: Path) -> None:
    words = (*LORA, "--model.checkpoint", str(checkpoint), "--trainer.max_steps", "5")
    unbroken = run_here(workplace, "debug/finetune", "out/lora_unbroken", *words)
    break_at(3, train, "debug/finetune", "out/lora_broken", *words)
    broken = train("debug/finetune", "out/lora_broken", *words)
    assert steps(unbroken) == steps(broken)
    for name in ("adapter_model.safetensors", "non_lora_trainables.safetensors"):
        before, after = load_file(unbroken / name), load_file(broken / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_quantised_run(train: Train, checkpoint: Path, caught: list[Any], bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    words = ("--model.checkpoint", str(checkpoint), "--lora.quantization", bits)
    out = train("debug/finetune", f"out/{bits}", *LORA, *words)
    model, _ = caught[0]
    kinds = {type(module).__name__ for module in model.language_model.model.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    for part in (model.vision_tower, model.projector, model.get_output_embeddings()):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert difference(caught[0], load_pretrained(checkpoint, quantization=bits)) > 0.05
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    # On the same rounded weights, nothing has changed; on the exact ones, the rounding goes.
    assert difference(caught[0], load_pretrained(out, quantization=bits)) <= CLOSE
    merged = load_pretrained(out)
    beside = load_pretrained(out, merge_lora=False)
    assert difference(merged, beside) <= CLOSE
    assert difference(caught[0], merged) > 0
    merge_folder(out, out / "whole")
    state = load_file(out / "whole/model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert difference(merged, load_pretrained(out / "whole")) <= CLOSE


def test_quantised_run_from_nothing(train: Train, caught: list[Any]) -> None:
    pytest.importorskip("bitsandbytes")
    out = train("debug/finetune", "out/nothing_4bit", *LORA, "--lora.quantization", "4bit")
    assert difference(caught[0], load_pretrained(out, quantization="4bit")) <= CLOSE
    exact = load_file(out / "non_lora_trainables.safetensors")
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    assert difference(load_pretrained(out), load_pretrained(out, merge_lora=False)) <= CLOSE


def test_starts_from_an_adapter(
    train: Train, checkpoint: Path, caught: list[Any], tmp_path: Path
) -> None:
    words = (*LORA, "--model.checkpoint", str(checkpoint))
    first = train("debug/finetune", "out/first", *words)
    still = ("--learning_rate", "0", "--lora_weight_path", str(first))
    second = train("debug/finetune", "out/second", *words, *still)
    assert difference(load_pretrained(first), load_pretrained(second)) <= CLOSE
    # Or as the checkpoint itself: merged, with fresh adapters on top.
    third = ("--model.checkpoint", str(first), "--learning_rate", "0")
    assert difference(
        load_pretrained(first), load_pretrained(train("debug/finetune", "out/3", *LORA, *third))
    ) <= 2 * CLOSE  # fmt: skip
    with pytest.raises(UserError, match="is not like those of this model.*lora.r"):
        train("debug/finetune", "out/other_rank", *words, *still, "--lora.r", "8")


# --- dtypes ---------------------------------------------------------------------------------------


PROJECTORS: dict[str, dict[str, Any]] = {
    "resampler": {},
    "hiwin": {"projector": {"type": "hiwin", "scales": [1, 4]}},
    "mlp": {"projector": {"type": "mlp2x_gelu"}, "image": {"strategy": "pad", "layout": "flat"}},
}


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("quantised", [False, True])
def test_half_precision(tmp_path: Path, projector: str, quantised: bool) -> None:
    """As on a GPU: frozen weights in bfloat16, what learns in float32, products in bfloat16."""
    if quantised:
        pytest.importorskip("bitsandbytes")
    save(tmp_path, tiny_parts(WHOLE_BLOCKS, **PROJECTORS[projector]))
    wanted = Quantization("4bit") if quantised else None
    model, processor = load_pretrained(tmp_path, dtype="bfloat16", quantization=wanted)
    section = LoraSection(r=2, quantization="4bit" if quantised else None)
    add_adapters(model, section)
    apply_stage(model, StageConfig(learn={"language_model": None, "projector": None}))
    use_masters(model, quantised)
    for name, parameter in model.named_parameters():
        norm = quantised and name.startswith("language_model.") and "norm" in name
        packed = not parameter.is_floating_point()
        half = torch.uint8 if packed else torch.bfloat16
        assert parameter.dtype == (torch.float32 if parameter.requires_grad or norm else half), name
    inputs = processor(text="<image> what", images=[picture(60, 40)])
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, labels=inputs["input_ids"].clamp(max=20)).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


def test_float32_runs_stay_as_they_are(tmp_path: Path) -> None:
    recipe = load_recipe("debug/finetune", [*LORA, "--output_dir", str(tmp_path)])
    arguments = training_arguments(recipe, None)
    model, _ = tiny_parts()
    model.to(torch.bfloat16)
    add_adapters(model, recipe.lora)
    apply_stage(model, recipe.stage)
    finish_adapters(model, recipe.lora, arguments)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_sharded_quantised_weights_are_refused(tmp_path: Path) -> None:
    words = [*LORA, "--lora.quantization", "8bit", "--output_dir", str(tmp_path)]
    recipe = load_recipe("debug/finetune", words)
    arguments = training_arguments(recipe, None)
    kept = storage(recipe, arguments, Path("scripts/deepspeed/zero2.json"))
    assert kept == {"quantization": Quantization("8bit"), "device": "cpu"}
    with pytest.raises(UserError, match="zero3 shards the weights.*--deepspeed zero2"):
        storage(recipe, arguments, Path("scripts/deepspeed/zero3.json"))


# --- published flags ------------------------------------------------------------------------------

PUBLISHED = (
    "--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --learning_rate 2e-4"
)
RECIPE = "uhd_v1/finetune_vicuna7b"


def load(words: str) -> Any:
    return load_recipe(RECIPE, words.split())


def test_published_commands() -> None:
    recipe = load(PUBLISHED)
    section = recipe.lora
    assert (section.r, section.scale_alpha, section.dropout) == (128, 256, 0.05)
    assert (section.targets, section.bias, section.quantization) == ("all-linear", "none", None)
    assert recipe.stage.learn == {"projector": 2e-5, "language_model": None}
    assert recipe.trainer.arguments["learning_rate"] == 2e-4
    section = load(f"{PUBLISHED} --bits 4 --double_quant False --quant_type fp4").lora
    assert (section.quantization, section.double_quant, section.quant_type) == (
        "4bit",
        False,
        "fp4",
    )
    assert load(f"--bits 8 {PUBLISHED}").lora.quantization == "8bit"
    section = load("--lora_enable True").lora
    assert (section.r, section.alpha) == (64, 16), "the published defaults"
    words = "--lora_dropout 0.1 --lora_bias lora_only --lora_weight_path x --lora_enable True"
    section = load(words).lora
    assert (section.dropout, section.bias, section.adapter_file) == (0.1, "lora_only", "x")


def test_flags_over_a_recipe_with_adapters(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: {RECIPE}\nlora: {{r: 8, quantization: 4bit}}\n")
    assert load_recipe(file).lora.scale_alpha == 16
    section = load_recipe(file, ["--lora_enable", "True", "--bits", "16"]).lora
    assert (section.r, section.alpha, section.quantization) == (8, None, None)
    assert load_recipe(file, ["--lora_r", "4"]).lora.r == 4
    assert not load_recipe(file, ["--lora_enable", "False"]).lora.enabled
    again = load_recipe(file)
    assert type(again).from_dict(again.to_dict()).lora == again.lora


@pytest.mark.parametrize("word", ["--lora_r 8", "--lora_weight_path a", "--quant_type fp4"])
def test_flags_without_adapters_say_so(word: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert load(word).lora == LoraSection()
    assert "has no effect here" in caplog.text


def test_commands_of_a_debug_run(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A published command as it is, at debug size."""
    pytest.importorskip("bitsandbytes")
    words = f"{PUBLISHED} --bits 4 --debug --max_steps 1".split()
    out = run_here(workplace, RECIPE, "out/published", *words)
    assert read_manifest(out)["kind"] == "lora"
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 128
