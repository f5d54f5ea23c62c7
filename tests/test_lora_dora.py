"""LoRA, QLoRA and DoRA from the recipe to the merged model, by hand-made sums of the weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_checkpoint import logits, save
from fixtures_runs import FROM_NOTHING, Train, run_here, run_on_two, steps
from fixtures_tiny import LLAMA, tiny_parts
from safetensors.torch import load_file

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.lora_merge import merge_folder

pytest.importorskip("peft")

CLOSE = 1e-5
# The four-bit kernel for CPUs takes rows of whole blocks of 64.
WHOLE_BLOCKS = {**LLAMA, "intermediate_size": 128}
RUN = (
    *FROM_NOTHING, "--lora.r", "4", "--lora.alpha", "12", "--learning_rate", "1e-2",
    "--trainer.max_steps", "3", "--trainer.save_steps", "2",
)  # fmt: skip
KINDS: dict[str, tuple[str, ...]] = {
    "lora": (),
    "dora": ("--lora.dora", "true"),
    "qlora_4bit": ("--lora.quantization", "4bit"),
    "qlora_4bit_dora": ("--lora.quantization", "4bit", "--lora.dora", "true"),
}
TOWER = r"vision_tower\.layers\.\d+\.self_attn\.[qv]_proj"
PROJECTOR = r"projector\..*"


def difference(first: Any, second: Any) -> float:
    return float((logits(*first) - logits(*second)).abs().max())


def bases(folder: Path) -> dict[str, Path]:
    """The same tiny model in float32 and, rounded, in bfloat16."""
    model, processor = tiny_parts(WHOLE_BLOCKS)
    found = {"float32": save(folder / "float32", (model, processor))}
    found["bfloat16"] = save(folder / "bfloat16", (model.bfloat16(), processor))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return bases(tmp_path_factory.mktemp("bases"))


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def by_hand(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """Base + adapter, from the files alone, in float64: names of the base to weights.

    LoRA: ``W + alpha / r * B A``; DoRA (arXiv 2402.09353): its rows scaled to the magnitudes.
    """
    settings = json.loads((folder / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    adapter = load_file(folder / "adapter_model.safetensors")
    learned = load_file(folder / "non_lora_trainables.safetensors")
    state = {name: tensor.double() for name, tensor in (state_of(base) | learned).items()}
    for key, up in adapter.items():
        if not key.endswith("lora_B.weight"):
            continue
        path = key.removesuffix(".lora_B.weight")
        name = path.removeprefix("base_model.model.") + ".weight"
        if name not in state:
            name = f"language_model.{name}"
        down = adapter[f"{path}.lora_A.weight"].double()
        weight = state[name] + scale * up.double() @ down
        magnitude = adapter.get(f"{path}.lora_magnitude_vector")
        if magnitude is not None:
            weight *= (magnitude.double() / weight.norm(dim=1)).unsqueeze(1)
        state[name] = weight
    return state


def assert_is_base_and_adapter(merged: Path, folder: Path, base: Path, dtype: torch.dtype) -> None:
    expected, found = by_hand(folder, base), state_of(merged)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dtype, name
        # In bfloat16 the sum is rounded once: half of its last place, 2**-8, for numbers below 1.
        most = CLOSE if dtype == torch.float32 else CLOSE + float(expected[name].abs().max()) / 256
        assert float((tensor.double() - expected[name]).abs().max()) <= most, name


# --- one process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_trains_saves_loads_with_its_base_and_merges_into_it(
    train: Train, models: dict[str, Path], tmp_path: Path, kind: str, dtype: str
) -> None:
    quantised = kind.startswith("qlora")
    if quantised:
        pytest.importorskip("bitsandbytes")
    base, words = models[dtype], ("--model.checkpoint", str(models[dtype]))
    out = train("debug/finetune", f"out/{kind}_{dtype}", *RUN, *words, *KINDS[kind])
    adapter = load_file(out / "adapter_model.safetensors")
    assert any(key.endswith("lora_magnitude_vector") for key in adapter) == ("dora" in kind)
    assert all("vision_tower" not in key and "projector" not in key for key in adapter)
    assert json.loads((out / "adapter_config.json").read_text())["use_dora"] == ("dora" in kind)

    beside = load_pretrained(out, merge_lora=False)
    assert difference(load_pretrained(base), beside) > 0.05, "three steps must matter"
    assert difference(beside, load_pretrained(out)) <= CLOSE
    if quantised:
        rounded = load_pretrained(out, quantization="4bit")
        names = {type(module).__name__ for module in rounded[0].modules()}
        assert "Linear4bit" in names and 0 < difference(beside, rounded)
    merge_folder(out, tmp_path / "own")
    assert_is_base_and_adapter(tmp_path / "own", out, base, getattr(torch, dtype))
    merge_folder(out, tmp_path / "exact", dtype=torch.float32)
    assert_is_base_and_adapter(tmp_path / "exact", out, base, torch.float32)
    assert difference(beside, load_pretrained(tmp_path / "exact")) <= CLOSE


@pytest.mark.parametrize("kind", ["dora", "qlora_4bit"])
def test_adapters_on_tower_and_projector_by_recipe(
    train: Train, models: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    if kind.startswith("qlora"):
        pytest.importorskip("bitsandbytes")
    words = (
        *("--model.checkpoint", str(models["float32"]), *KINDS[kind]),
        *("--lora.extra_targets", json.dumps([TOWER, PROJECTOR])),
        *("--stage.learn.vision_tower", "1e-2"),
    )
    out = train("debug/finetune", f"out/everywhere_{kind}", *RUN, *words)
    adapter = load_file(out / "adapter_model.safetensors")
    paths = {key.partition(".lora_")[0] for key in adapter}
    tower = {path for path in paths if "vision_tower" in path}
    assert {path.rpartition(".")[2] for path in tower} == {"q_proj", "v_proj"}
    assert any("projector" in path for path in paths)
    moved = [key for key in adapter if "vision_tower" in key and key.endswith("lora_B.weight")]
    assert all(bool(adapter[key].any()) for key in moved), "the tower's adapters learn"
    merge_folder(out, tmp_path / "whole")
    assert_is_base_and_adapter(tmp_path / "whole", out, models["float32"], torch.float32)
    beside = load_pretrained(out, merge_lora=False)
    assert difference(beside, load_pretrained(tmp_path / "whole")) <= CLOSE


# --- two processes --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
@pytest.mark.parametrize(("kind", "deepspeed"), [("dora", "zero3"), ("qlora_4bit", "zero2")])
def test_adapters_under_deepspeed_on_two_processes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    models: dict[str, Path],
    kind: str,
    deepspeed: str,
) -> None:
    """Losses and adapters of one process; the folder loads with its base and merges into it."""
    if kind.startswith("qlora"):
        pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    # Without dropout, which each rank draws for itself.
    words = (*RUN, "--model.checkpoint", str(models["float32"]), *KINDS[kind], "--lora.dropout")
    words = (*words, "0", "--trainer.global_batch_size", "4", "--learning_rate", "1e-3")
    alone = run_here(tmp_path, "debug/finetune", "alone", *words, "--deepspeed", "null")
    two = tmp_path / "two"
    run_on_two(
        tmp_path, "debug/finetune", *words, "--deepspeed", deepspeed, "--trainer.output_dir", "two"
    )
    for one, other in zip(steps(alone), steps(two), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)
    ours, theirs = (load_file(each / "adapter_model.safetensors") for each in (two, alone))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].shape == tensor.shape
        # Adam divides by small gradients: those differ in their last digits.
        assert float((ours[key] - tensor).abs().max()) < 2e-3, key
    merge_folder(two, tmp_path / "whole")
    assert_is_base_and_adapter(tmp_path / "whole", two, models["float32"], torch.float32)
    beside = load_pretrained(two, merge_lora=False)
    assert difference(beside, load_pretrained(tmp_path / "whole")) <= CLOSE
