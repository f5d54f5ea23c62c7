"""FSDP2 in the place of DeepSpeed: the same losses, checkpoints for any number of processes."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures_runs import run_here, run_on_two, steps, weights, with_drawn_data
from safetensors.torch import load_file
from torch import nn

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.config.recipe import load_recipe
from llava_uhd.errors import UserError
from llava_uhd.train import setup
from llava_uhd.train.fsdp import fsdp_plan, fsdp_values, host_backend, keep_masters, layer_classes
from llava_uhd.train.memory import state_memory
from llava_uhd.train.output import RECIPE_FILE
from llava_uhd.train.saving import SEAL_FILE, problem
from llava_uhd.train.shares import (
    FOLDER,
    entries,
    gathered,
    holds_shares,
    load_optimizer,
    load_weights,
    save_shares,
)

SHORT = (
    *("--debug", "--trainer.max_steps", "4", "--trainer.logging_steps", "1"),
    *("--trainer.save_steps", "2", "--trainer.save_total_limit", "5"),
)


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "fsdp", "deepspeed"),
    [
        ("", None, "zero2"),
        ("--fsdp full_shard", "full_shard", None),
        ("--fsdp", "full_shard", None),
        ("--fsdp null", None, "zero2"),
        ("--fsdp full_shard auto_wrap", "full_shard", None),
        ("--fsdp shard_grad_op --deepspeed null", "shard_grad_op", None),
        ("--fsdp full_shard offload auto_wrap", "full_shard_offload", None),
    ],
)
def test_it_takes_the_place_of_an_inherited_deepspeed(
    words: str, fsdp: str | None, deepspeed: str | None
) -> None:
    recipe = load_recipe("uhd_v1/finetune_vicuna7b", words.split())
    assert (recipe.fsdp, recipe.deepspeed) == (fsdp, deepspeed)


def test_deepspeed_takes_the_place_of_an_inherited_fsdp(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("base: uhd_v1/finetune_vicuna7b\nfsdp: full_shard\n")
    assert load_recipe(file).deepspeed is None
    recipe = load_recipe(file, ["--deepspeed", "zero3"])
    assert (recipe.fsdp, recipe.deepspeed) == (None, "zero3")
    # What a run writes down is read again.
    written = tmp_path / "recipe.yaml"
    written.write_text(load_recipe(file).to_yaml())
    assert load_recipe(written).fsdp == "full_shard"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--fsdp full_shard --deepspeed zero3", "zero3 and fsdp full_shard exclude each other"),
        ("--fsdp zero3", "fsdp must be full_shard or shard_grad_op"),
        ("--trainer.fsdp_config.version 1", "fsdp_config"),
    ],
)
def test_recipes_that_contradict_themselves(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("uhd_v1/finetune_vicuna7b", words.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lora.r 8 --lora.quantization 4bit", "quantised ones cannot be: --deepspeed zero2"),
        ("--trainer.optim adamw_bnb_8bit", "cannot work on the shares"),
        ("--trainer.fp16 true", "fp16 is not supported with fsdp"),
        ("--trainer.load_best_model_at_end true", "load_best_model_at_end is not supported"),
    ],
)
def test_what_it_cannot_do_is_refused(words: str, message: str) -> None:
    recipe = load_recipe("uhd_v1/finetune_vicuna7b", ["--fsdp", "full_shard", *words.split()])
    with pytest.raises(UserError, match=message):
        fsdp_values(recipe, dict(recipe.trainer.arguments), 2)
    assert fsdp_values(recipe, dict(recipe.trainer.arguments), 1) == {}  # left out


def test_one_process_leaves_it_out_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    recipe = load_recipe("uhd_v1/finetune_vicuna7b", ["--debug", "--fsdp", "full_shard"])
    with caplog.at_level(logging.INFO):
        assert setup.deepspeed_config(recipe) is None
        assert not setup.training_arguments(recipe, None).fsdp
    told = [each.getMessage() for each in caplog.records if "fsdp" in each.getMessage()]
    assert told == ["fsdp full_shard is left out: one process has nothing to share"]


def test_shares_on_the_host_need_a_backend_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FSDP_OFFLOAD_PARAMS", raising=False)
    recipe = load_recipe("uhd_v1/finetune_vicuna7b", ["--fsdp", "full_shard_offload"])
    assert not fsdp_values(recipe, {}, 2)["fsdp_config"]["cpu_offload"] or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    values = fsdp_values(recipe, {"accelerator_config": {"even_batches": False}}, 2)
    assert values["fsdp_config"]["cpu_offload"]
    assert values["accelerator_config"]["even_batches"] is False
    assert values["accelerator_config"]["gradient_accumulation_kwargs"]["sync_each_batch"]
    with host_backend(values):
        assert os.environ["FSDP_OFFLOAD_PARAMS"] == "true"
    assert "FSDP_OFFLOAD_PARAMS" not in os.environ


# --- estimates, layers, dtypes --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bf16", "expected"),
    [
        # Half of weights, gradients and moments of 100 + 100 frozen values.
        ("full_shard", False, (400.0, 200.0, 400.0)),
        ("shard_grad_op", False, (400.0 + 800.0, 200.0, 400.0)),
        ("shard_grad_op", True, (400.0 + 400.0, 200.0, 400.0)),
    ],
)
def test_memory(name: str, bf16: bool, expected: tuple[float, float, float]) -> None:
    recipe = load_recipe("uhd_v1/finetune_vicuna7b", ["--fsdp", name])
    arguments: Any = SimpleNamespace(**fsdp_values(recipe, {}, 2), bf16=bf16)
    model = nn.ModuleList([nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)])
    model[0].requires_grad_(False)
    memory = state_memory(model, fsdp_plan(arguments, 2))
    assert (memory.weights, memory.gradients, memory.optimizer) == expected


def test_on_the_host_a_device_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    recipe = load_recipe("uhd_v1/finetune_vicuna7b", ["--fsdp", "full_shard_offload"])
    arguments: Any = SimpleNamespace(**fsdp_values(recipe, {}, 2), bf16=True)
    assert state_memory(nn.Linear(10, 10), fsdp_plan(arguments, 2)).state == 0


def test_what_learns_is_its_own_master() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]).bfloat16()
    model[0].requires_grad_(False)
    arguments: Any = SimpleNamespace(fsdp=True, bf16=True)
    keep_masters(model, arguments)
    assert (model[0].weight.dtype, model[1].weight.dtype) == (torch.bfloat16, torch.float32)


def test_layers_are_found_in_the_model(tiny_checkpoint: Path) -> None:
    model, _ = load_pretrained(tiny_checkpoint)
    assert layer_classes(model) == ["CLIPEncoderLayer", "LlamaDecoderLayer"]


# --- one process that shares out ------------------------------------------------------------------


class Small(nn.Module):
    """Tied and frozen weights, and a scalar that was widened."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.rest = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.rest.bias.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.rest(self.table(ids)) * self.scale)


@pytest.fixture
def alone_in_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def trained(model: nn.Module, count: int) -> torch.optim.Optimizer:
    learning = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW([{"params": learning[:1]}, {"params": learning[1:]}], lr=0.1)
    step(model, optimizer, count)
    return optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.arange(7)).square().sum().backward()
        optimizer.step()


def test_shares_with_and_without_fsdp(tmp_path: Path, alone_in_group: None) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    whole = Small()
    shared = Small()
    shared.load_state_dict(whole.state_dict())
    fully_shard(shared)
    first, second = trained(whole, 2), trained(shared, 2)
    save_shares(shared, second, tmp_path)
    assert holds_shares(tmp_path)
    # Into a model that is whole, and from there on the same steps.
    again = Small()
    again.rest.bias.data.copy_(whole.rest.bias)
    optimizer = trained(again, 0)
    load_weights(again, tmp_path)
    load_optimizer(again, optimizer, tmp_path)
    for model, each in ((whole, first), (shared, second), (again, optimizer)):
        step(model, each, 2)
    for model in (shared, again):
        state = gathered(model, lambda name: True, keep=True)
        assert state["table.weight"] is state["head.weight"]
        for name, value in whole.state_dict().items():
            assert torch.allclose(state[name], value, atol=1e-6), name
    assert set(gathered(shared, lambda name: name.startswith("rest."), keep=True)) == {
        "rest.weight", "rest.bias",
    }  # fmt: skip
    assert gathered(shared, lambda name: True, keep=False) == {}


def test_shares_of_other_parameters_are_refused(tmp_path: Path, alone_in_group: None) -> None:
    model = Small()
    save_shares(model, trained(model, 1), tmp_path)
    model.rest.weight.requires_grad_(False)
    with pytest.raises(UserError, match=r"other parts learn \(rest.weight, ...\)"):
        load_weights(model, tmp_path)


def test_a_full_disk_is_told_as_such(
    tmp_path: Path, alone_in_group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch wraps what a process meets in an error that is no Exception."""
    model = Small()
    optimizer = trained(model, 1)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(OSError, match="No space left"):
        save_shares(model, optimizer, tmp_path)


# --- two processes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_drawn_data(tmp_path_factory.mktemp("fsdp"))


def assert_close(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert [entry["step"] for entry in found] == [entry["step"] for entry in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def assert_same_result(found: Path, wanted: Path) -> None:
    ours, theirs = weights(found), weights(wanted)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].shape == tensor.shape
        # Adam divides by small gradients: those differ in their last digits.
        assert float((ours[key] - tensor).abs().max()) < 2e-3, key


def broken_off(workplace: Path, source: str, target: str) -> Path:
    """An output folder as a kill after step 3 leaves it."""
    before, after = workplace / source, workplace / target
    after.mkdir()
    shutil.copytree(before / "checkpoint-2", after / "checkpoint-2")
    for name in (RECIPE_FILE, "data_manifest.json"):
        shutil.copy(before / name, after)
    lines = [line for line in (before / "log.jsonl").open() if json.loads(line)["step"] <= 3]
    (after / "log.jsonl").write_text("".join(lines))
    return after


@pytest.mark.slow
def test_first_stage_with_held_out_samples(workplace: Path) -> None:
    """What is evaluated is written right after; generation gathers, too."""
    words = (*SHORT, "--data.holdout", "4", "--data.holdout_samples", "1")
    words = (*words, "--trainer.eval_steps", "2")
    recipe = "uhd_v2/pretrain_vicuna7b"
    alone = run_here(workplace, recipe, "first_alone", *words, "--deepspeed", "null")
    run_on_two(workplace, recipe, *words, "--fsdp", "shard_grad_op",
               "--trainer.output_dir", "first_two")  # fmt: skip
    two = workplace / "first_two"
    assert_close(steps(two), steps(alone))
    held = [
        [json.loads(line) for line in (folder / "log.jsonl").open() if "eval_loss" in line]
        for folder in (two, alone)
    ]
    assert len(held[0]) == 2
    for one, other in zip(*held, strict=True):
        assert one["eval_loss"] == pytest.approx(other["eval_loss"], abs=1e-4)
    assert_same_result(two, alone)
    # Two moments and a counter of every parameter, though all units were whole a moment before.
    found = [name.partition("/")[0] for name in entries(two / "checkpoint-2")]
    counts = [found.count(kind) for kind in ("model", "moments", "numbers")]
    assert counts[0] > 0 and counts == [counts[0], 2 * counts[0], counts[0]]


# Texts, tiles, several images and a video, other ones on each rank, under compression.
RAGGED = (
    *("onevision/stage2_ov_qwen2_7b", *SHORT, "--compression.schedule", "four_stage"),
    *("--trainer.global_batch_size", "4", "--trainer.loss", "chunked"),
    *("--fsdp", "full_shard", "--trainer.per_device_train_batch_size", "1"),
)


@pytest.mark.slow
def test_ragged_batches_and_going_on(workplace: Path) -> None:
    recipe, *words = RAGGED
    alone = run_here(workplace, recipe, "alone", *words)
    run_on_two(workplace, *RAGGED, "--trainer.output_dir", "two")
    two = workplace / "two"
    assert_close(steps(two), steps(alone))
    assert_same_result(two, alone)
    model, _ = load_pretrained(two)
    assert model.config.architectures == ["LlavaUHDForConditionalGeneration"]

    checkpoint = two / "checkpoint-2"
    shares = sorted(path.name for path in (checkpoint / FOLDER).iterdir())
    assert shares == [".metadata", "__0_0.distcp", "__1_0.distcp"] and problem(checkpoint) is None
    assert not list(checkpoint.glob("*.safetensors"))
    start = json.loads((two / "run.json").read_text())["starts"][0]
    assert (start["deepspeed"], start["fsdp"]) == (None, "full_shard")
    facts = json.loads((checkpoint / SEAL_FILE).read_text())
    assert (facts["engine"], facts["ranks"], facts["global_batch"]) == ("fsdp", 2, 4)

    resumed = broken_off(workplace, "two", "two_resumed")
    run_on_two(workplace, *RAGGED, "--trainer.output_dir", "two_resumed")
    assert steps(resumed) == steps(two)
    before, after = weights(two), weights(resumed)
    assert all(torch.equal(before[name], after[name]) for name in before)

    # One process alone has no FSDP, and reads the shares.
    single = broken_off(workplace, "two", "one_resumed")
    run_here(workplace, recipe, "one_resumed", *words)
    assert_close(steps(single), steps(two))
    assert_same_result(single, two)


@pytest.mark.slow
def test_from_one_process_to_two_with_adapters(workplace: Path) -> None:
    recipe = "llava_1_5/lora_vicuna7b"
    # Without dropout, which each rank draws for itself.
    words = (*SHORT, "--lora.dropout", "0", "--fsdp", "full_shard")
    alone = run_here(workplace, recipe, "lora_alone", *words)
    resumed = broken_off(workplace, "lora_alone", "lora_two")
    printed = run_on_two(workplace, recipe, *words, "--trainer.output_dir", "lora_two")
    assert "was written by 1 process, now there are 2" in " ".join(printed.split())
    assert_close(steps(resumed), steps(alone))
    ours, theirs = (load_file(each / "adapter_model.safetensors") for each in (resumed, alone))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert float((ours[name] - tensor).abs().max()) < 2e-3, name
    assert holds_shares(resumed / "checkpoint-4") and not holds_shares(resumed / "checkpoint-2")
