"""Optimizers by recipe, schedules by recipe: rates, decay, rounded state, going on, refusals."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures_lora import LANGUAGES
from fixtures_runs import (
    FROM_NOTHING,
    Train,
    assert_same_run,
    break_at,
    run_on_two,
    steps,
    weights,
)
from fixtures_tiny import tiny_parts
from torch import nn
from transformers import Trainer, TrainingArguments

from llava_uhd.config.recipe import load_recipe
from llava_uhd.config.training import PARTS, StageConfig
from llava_uhd.errors import UserError
from llava_uhd.train.elastic import fitting
from llava_uhd.train.optimizers import (
    check_optimizer,
    check_schedule,
    make_optimizer,
    make_schedule,
    schedule_options,
)
from llava_uhd.train.saving import SEAL_FILE
from llava_uhd.train.setup import training_arguments
from llava_uhd.train.stages import apply_stage, parameter_groups, part_of

ZERO = Path(__file__).resolve().parents[1] / "scripts/deepspeed"
ROUNDED = ("adamw_bnb_8bit", "paged_adamw_8bit")
BNB = (*ROUNDED, "paged_adamw_32bit")


def settings(*words: str) -> TrainingArguments:
    """Arguments of a debug run with further words."""
    return training_arguments(load_recipe("debug/finetune", [*FROM_NOTHING, *words]), None)


# --- parts ----------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "resampler": {},
    "hiwin": {"projector": {"type": "hiwin", "scales": [1, 2]}},
    "mlp": {"projector": {"type": "mlp2x_gelu"}, "image": {"strategy": "pad", "layout": "flat"}},
    "newline": {
        "projector": {"type": "mlp2x_gelu"},
        "image": {
            "strategy": "anyres",
            "layout": "unpad",
            "pinpoints": [[32, 64], [64, 32], [64, 64]],
        },
    },
    "qwen3": {"text": LANGUAGES["qwen3"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_has_its_rate_and_norms_and_biases_never_decay(kind: str) -> None:
    model, _ = tiny_parts(**KINDS[kind])
    present = {part_of(name) for name, _ in model.named_parameters()}
    rates = {part: (1 + place) * 1e-3 for place, part in enumerate(PARTS) if part in present}
    stage = StageConfig(learn=dict(rates))
    apply_stage(model, stage)
    arguments = settings("--trainer.weight_decay", "0.1")
    decaying = set(Trainer.get_decay_parameter_names(None, model))
    groups = parameter_groups(model, stage, 7.0, arguments.weight_decay, decaying)
    optimizer = make_optimizer(arguments, groups, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    still = {
        f"{path}.{own}" if path else own
        for path, module in model.named_modules()
        for own, _ in module.named_parameters(recurse=False)
        if "Norm" in type(module).__name__ or own.endswith("bias")
    }
    seen: dict[str, tuple[float, float]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in seen
            seen[name] = (group["lr"], group["weight_decay"])
    assert set(seen) == {name for name, each in model.named_parameters() if each.requires_grad}
    for name, (rate, decay) in seen.items():
        assert rate == rates[part_of(name)], name
        assert decay == (0.0 if name in still else 0.1), name
    assert {0.0, 0.1} == {decay for _, decay in seen.values()}


# --- rounded and paged state ----------------------------------------------------------------------


@pytest.mark.parametrize("optim", BNB)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_trains_saves_and_goes_on(train: Train, workplace: Path, optim: str) -> None:
    pytest.importorskip("bitsandbytes")
    words = (
        *("--trainer.optim", optim, "--trainer.max_steps", "4", "--trainer.save_steps", "2"),
        *("--trainer.learning_rate", "1e-2", "--trainer.weight_decay", "0.1", *FROM_NOTHING),
    )
    unbroken = train("debug/finetune", f"out/{optim}", *words)
    kept = torch.load(unbroken / "checkpoint-4/optimizer.pt", weights_only=True)["state"]
    dtypes = {each["__bnb_optimizer_quant_state__"]["state1"].dtype for each in kept.values()}
    exact = {torch.float32}
    assert dtypes == (exact | {torch.uint8} if optim in ROUNDED else exact)
    break_at(3, train, "debug/finetune", f"out/{optim}_broken", *words)
    broken = train("debug/finetune", f"out/{optim}_broken", *words)
    assert_same_run(unbroken, broken)
    losses = [entry["loss"] for entry in steps(unbroken)]
    assert losses[-1] < losses[0] - 0.5, "it learns"


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(("optim", "most"), [("paged_adamw_32bit", 1e-5), ("adamw_8bit", 0.05)])
def test_steps_are_those_of_adamw(optim: str, most: float) -> None:
    """Over the way that AdamW itself goes; eight bits round it a little."""
    pytest.importorskip("bitsandbytes")
    ways = []
    for name in ("adamw_torch", optim):
        torch.manual_seed(0)
        module = nn.Linear(128, 64)
        start = module.weight.detach().clone()
        inputs, targets = torch.randn(32, 128), torch.randn(32, 64)
        arguments = settings("--trainer.optim", name, "--learning_rate", "1e-2")
        groups = [{"params": list(module.parameters()), "lr": 1e-2, "weight_decay": 0.1}]
        optimizer = make_optimizer(arguments, groups, module)
        for _ in range(20):
            (module(inputs) - targets).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ways.append(module.weight.detach() - start)
    apart = float((ways[0] - ways[1]).norm() / ways[0].norm())
    assert (0 if optim == "adamw_8bit" else -1) < apart < most


def test_embeddings_keep_exact_state() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, _ = tiny_parts()
    stage = StageConfig(learn={"language_model": None})
    apply_stage(model, stage)
    arguments = settings("--trainer.optim", "adamw_bnb_8bit")
    groups = parameter_groups(model, stage, 1e-3, 0.0, set())
    optimizer = make_optimizer(arguments, groups, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    table = model.get_input_embeddings().weight
    assert table.numel() >= 4096, "large enough to be rounded"
    assert optimizer.state[table]["state1"].dtype == torch.float32
    head = model.get_output_embeddings().weight
    assert optimizer.state[head]["state1"].dtype == torch.uint8
    # The exceptions are this optimizer's, not those of every one to come.
    shared = bitsandbytes.optim.GlobalOptimManager.get_instance()
    assert not any(module is model.get_input_embeddings()
                   for module, _, _ in shared.module_weight_config_triple)  # fmt: skip


@pytest.mark.parametrize(
    ("optim", "file", "message"),
    [
        ("paged_adamw_8bit", "zero2", "deepspeed zero2 is paged: use adamw_torch with zero3_off"),
        ("adamw_bnb_8bit", "zero3_offload", "meets a state that is offloaded already"),
        ("galore_adamw", None, "trainer.optim galore_adamw: "),
        ("lomo", None, "trainer.optim lomo: "),
    ],
)
def test_optimizers_that_cannot_run_are_refused(optim: str, file: str | None, message: str) -> None:
    pytest.importorskip("bitsandbytes")
    deepspeed = None if file is None else ZERO / f"{file}.json"
    with pytest.raises(UserError, match=message):
        check_optimizer(settings("--trainer.optim", optim), deepspeed)


def test_optimizers_that_can_run_pass() -> None:
    pytest.importorskip("bitsandbytes")
    for optim in (*BNB, "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "lion_8bit"):
        check_optimizer(settings("--trainer.optim", optim), None)
    for file in ("zero2", "zero3"):
        check_optimizer(settings("--trainer.optim", "adamw_bnb_8bit"), ZERO / f"{file}.json")


def test_fsdp_and_groups_of_its_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    arguments = settings("--trainer.optim", "adamw_bnb_8bit")
    object.__setattr__(arguments, "fsdp", "full_shard")
    with pytest.raises(UserError, match="adamw_bnb_8bit cannot round what FSDP shares out"):
        check_optimizer(arguments, None)
    chosen = lambda *given: (torch.optim.AdamW, {"params": []})  # noqa: E731
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(chosen))
    with pytest.raises(UserError, match="groups parameters in its own way"):
        check_optimizer(settings(), None)


def test_a_library_without_kernels_for_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def nothing(*given: Any) -> None:
        raise NotImplementedError("no kernel for cpu")

    monkeypatch.setattr(bitsandbytes.optim.AdamW, "update_step", nothing)
    with pytest.raises(UserError, match=r"does not run on this machine's cpu \(no kernel"):
        check_optimizer(settings("--trainer.optim", "adamw_bnb_8bit"), None)


def test_rounded_state_stays_on_its_number_of_processes(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    facts = {"engine": "deepspeed", "ranks": 2, "global_batch": 4}
    (tmp_path / SEAL_FILE).write_text(json.dumps(facts))
    shape = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "world_size": 4}
    for optim, engine in (("adamw_bnb_8bit", True), ("adamw_bnb_8bit", False)):
        given = settings("--trainer.optim", optim)
        fields = ("learning_rate", "optim", "optim_args", "adam_beta1", "adam_beta2")
        args = SimpleNamespace(**shape, **{key: getattr(given, key) for key in fields},
                               adam_epsilon=1e-8)  # fmt: skip
        trainer: Any = SimpleNamespace(
            args=args, is_deepspeed_enabled=engine, is_fsdp_enabled=False
        )
        if engine:
            with pytest.raises(UserError, match="8-bit state that DeepSpeed .* NPROC=2"):
                fitting(trainer, tmp_path)
        else:
            (tmp_path / SEAL_FILE).write_text(json.dumps({**facts, "engine": "plain"}))
            assert fitting(trainer, tmp_path) == tmp_path


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_rounded_state_that_deepspeed_shares_out_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    words = (
        *("debug/finetune", *FROM_NOTHING, "--deepspeed", "zero2", "--learning_rate", "1e-2"),
        *("--trainer.optim", "adamw_bnb_8bit", "--trainer.max_steps", "4"),
        *("--trainer.save_steps", "2", "--trainer.save_total_limit", "3"),
    )
    run_on_two(tmp_path, *words, "--trainer.output_dir", "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken/checkpoint-4")
    (tmp_path / "broken/llava_uhd.json").unlink()
    (tmp_path / "broken/model.safetensors").unlink()
    run_on_two(tmp_path, *words, "--trainer.output_dir", "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    assert steps(tmp_path / "whole")[-1]["loss"] < steps(tmp_path / "whole")[0]["loss"] - 0.5


# --- schedules ------------------------------------------------------------------------------------


def cosine(step: int) -> float:
    """Of 10 steps, 2 of warm-up."""
    return step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 8))


def level(step: int) -> float:
    return min(step / 2, 1.0)


def decays(first: int, form: Callable[[float], float]) -> Callable[[int], float]:
    """Warm-up of 2, level until ``first``, then a form of the part of the decay that is over."""
    return lambda step: level(step) if step < first else form((step - first) / (10 - first))


def above(least: float, factor: Callable[[int], float]) -> Callable[[int], float]:
    """The same, between a least factor and 1."""
    return lambda step: least + (1 - least) * factor(step)


def falling(over: float) -> float:
    """Half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * over))


WSD = ("--trainer.lr_scheduler_type", "warmup_stable_decay", "--trainer.lr_scheduler_kwargs")
SCHEDULES: dict[str, tuple[tuple[str, ...], Callable[[int], float]]] = {
    "cosine": (("--trainer.lr_scheduler_type", "cosine"), cosine),
    "constant_with_warmup": (("--trainer.lr_scheduler_type", "constant_with_warmup"), level),
    "wsd_share": (
        (*WSD, '{"num_decay_steps": 0.4, "decay_type": "linear"}'),
        decays(6, lambda over: 1 - over),
    ),
    "wsd_steps": (
        (*WSD, '{"num_decay_steps": 5, "min_lr_ratio": 0.1}'),
        above(0.1, decays(5, falling)),
    ),
    "wsd_alone": (WSD[:2], decays(9, falling)),
    "wsd_root": (
        (*WSD, '{"num_decay_steps": 0.25, "num_stable_steps": 5, "decay_type": "1-sqrt"}'),
        decays(7, lambda over: 1 - math.sqrt(over)),
    ),
}
TEN = ("--trainer.max_steps", "10", "--trainer.warmup_steps", "2", *FROM_NOTHING)


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_of_a_schedule(name: str) -> None:
    words, expected = SCHEDULES[name]
    arguments = settings(*TEN, *words)
    check_schedule(arguments)
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1e-3, 2e-5)]
    optimizer = torch.optim.SGD(groups)
    schedule = make_schedule(arguments, optimizer, 10)
    for step in range(10):
        found = [group["lr"] for group in optimizer.param_groups]
        assert found == pytest.approx([1e-3 * expected(step), 2e-5 * expected(step)])
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("name", ["cosine", "constant_with_warmup"])
def test_logged_rates_are_the_formula(train: Train, name: str) -> None:
    words, expected = SCHEDULES[name]
    out = train("debug/finetune", f"out/{name}", *TEN, *words, "--learning_rate", "3e-4")
    logged = [entry["learning_rate"] for entry in steps(out)]
    assert logged == pytest.approx([3e-4 * expected(step) for step in range(10)])


def test_going_on_in_the_middle_of_the_decay(train: Train, workplace: Path) -> None:
    words, expected = SCHEDULES["wsd_share"]
    given = (
        *("debug/finetune", "out/wsd", *TEN, *words, "--trainer.save_steps", "4"),
        *("--learning_rate", "3e-4", "--stage.learn.projector", "1e-3"),
    )
    break_at(9, train, *given)
    assert (workplace / "out/wsd/checkpoint-8").is_dir(), "two steps into the decay"
    entries = steps(train(*given))
    assert [entry["step"] for entry in entries] == list(range(1, 11))
    for part, rate in (("language_model", 3e-4), ("projector", 1e-3)):
        # Named where they differ: at first all of them are 0.
        logged = [entry.get(f"learning_rate_{part}", entry["learning_rate"]) for entry in entries]
        assert logged == pytest.approx([rate * expected(step) for step in range(10)]), part
    unbroken = train("debug/finetune", "out/wsd_unbroken", *given[2:])
    assert steps(unbroken) == entries
    before, after = weights(unbroken), weights(workplace / "out/wsd")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_shares_of_a_long_run() -> None:
    arguments = settings(*WSD, '{"num_decay_steps": 0.1}')
    assert schedule_options(arguments, 250) == {"num_decay_steps": 25}
    assert schedule_options(settings(*WSD[:2]), 5198) == {"num_decay_steps": 520}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*WSD, '{"num_decay_stesp": 3}'), "no option 'num_decay_stesp' .it has: num_decay_steps"),
        ((*WSD, '{"decay_type": "steep"}'), "Unknown decay type: steep"),
        ((*WSD, '{"num_decay_steps": -1}'), "num_decay_steps must be a number of steps"),
        ((*WSD, '{"num_decay_steps": "late"}'), "num_decay_steps must be a number of steps"),
        ((*WSD, "[1]"), "lr_scheduler_kwargs"),
        (
            ("--trainer.lr_scheduler_kwargs", '{"num_decay_steps": 3}'),
            r"cosine has no option 'num_decay_steps' \(it has: num_cycles\)",
        ),
        (
            (
                *("--trainer.lr_scheduler_type", "constant_with_warmup"),
                *("--trainer.lr_scheduler_kwargs", '{"min_lr": 0}'),
            ),
            r"constant_with_warmup has no option 'min_lr' \(it has: none\)",
        ),
        (("--trainer.lr_scheduler_type", "cosine_with_min_lr"), "of cosine_with_min_lr: .*min_lr"),
    ],
)
def test_wrong_options_are_refused_before_the_run(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_schedule(settings(*words))


def test_phases_longer_than_the_run(train: Train, workplace: Path) -> None:
    words = (*TEN, *WSD, '{"num_decay_steps": 9}')
    with pytest.raises(UserError, match="2 steps of warm-up .* 9 of decay .* than the run's 10"):
        train("debug/finetune", "out/long", *words)
    assert not list((workplace / "out/long").glob("checkpoint-*"))
