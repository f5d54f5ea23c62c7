"""Which layers get adapters, and what learns with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_checkpoint import logits, save
from fixtures_lora import LANGUAGES, adapted, adapted_tiny
from fixtures_tiny import tiny_parts
from safetensors.torch import load_file

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.lora_write import save_lora
from llava_uhd.config.lora import LoraSection
from llava_uhd.config.training import StageConfig
from llava_uhd.errors import UserError
from llava_uhd.train.lora import add_adapters, learn_biases
from llava_uhd.train.stages import apply_stage, parameter_groups, part_reports

pytest.importorskip("peft")

CLOSE = 1e-5


def difference(first: Any, second: Any) -> float:
    return float((logits(*first) - logits(*second)).abs().max())


# --- targets --------------------------------------------------------------------------------------


def adapted_layers(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("kind", LANGUAGES)
def test_all_linear_layers_of_the_language_model(kind: str) -> None:
    model, _ = tiny_parts(text=LANGUAGES[kind])
    add_adapters(model, LoraSection(r=2))
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    found = adapted_layers(model)
    assert {name.rpartition(".")[2] for name in found} == set(names)
    assert len(found) == 2 * len(names)
    assert all(name.startswith("language_model.model.layers.") for name in found)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj", "v_proj"], 4),
        ("q_proj", 2),
        (["self_attn.q_proj", r"model\.layers\.1\.mlp\..*"], 5),
        (r"model\.layers\.\d+\.self_attn\.[qk]_proj", 4),
    ],
)
def test_chosen_layers_are_never_in_the_tower(targets: Any, count: int) -> None:
    """The tower's attention has layers of the same names."""
    model, _ = tiny_parts()
    assert any(name.endswith("q_proj") for name, _ in model.vision_tower.named_modules())
    add_adapters(model, LoraSection(r=2, targets=targets))
    found = adapted_layers(model)
    assert len(found) == count
    assert all(name.startswith("language_model.") for name in found)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"targets": "query"},
            r"lora\.targets 'query' matches no linear layer.*layers\.N\.self_at",
        ),
        ({"targets": "lm_head"}, r"lora\.targets 'lm_head' matches no linear layer"),
        ({"extra_targets": "q_proj"}, r"extra_targets 'q_proj' matches no linear layer of tower"),
        ({"extra_targets": r"language_model\..*"}, r"extra_targets .* matches no linear layer"),
    ],
)
def test_targets_that_are_none(section: dict[str, Any], message: str) -> None:
    model, _ = tiny_parts()
    with pytest.raises(UserError, match=message):
        add_adapters(model, LoraSection(r=2, **section))


def test_layers_that_are_never_called() -> None:
    """The fast form of this projector multiplies weights with each other first."""
    model, _ = tiny_parts(projector={"type": "hiwin", "scales": [1, 2]})
    with pytest.raises(UserError, match=r"projector\S* cannot carry adapters.*stage\.learn"):
        add_adapters(model, LoraSection(r=2, extra_targets=r"projector\.features.*"))


TOWER = r"vision_tower\.layers\.\d+\.self_attn\.[qv]_proj"


def test_adapters_in_the_tower(tmp_path: Path) -> None:
    trained = adapted_tiny(tmp_path, extra_targets=TOWER)
    model, _ = trained
    found = {name for name in adapted_layers(model) if name.startswith("vision_tower.")}
    assert len(found) == 4
    keys = load_file(tmp_path / "lora/adapter_model.safetensors").keys()
    assert "base_model.model.vision_tower.layers.0.self_attn.q_proj.lora_A.weight" in keys
    for merge in (True, False):
        assert difference(trained, load_pretrained(tmp_path / "lora", merge_lora=merge)) <= CLOSE
    stage = StageConfig(learn={"language_model": 1e-3, "vision_tower": 1e-5})
    apply_stage(model, stage)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {
        names[parameter]: group["lr"]
        for group in parameter_groups(model, stage, 1.0, 0.0, set())
        for parameter in group["params"]
    }
    assert all("lora_" in name for name in rates)
    assert {rate for name, rate in rates.items() if name.startswith("vision_tower.")} == {1e-5}
    with pytest.raises(UserError, match=r"adapters into vision_tower, but stage\.learn leaves it"):
        apply_stage(model, StageConfig(learn={"language_model": 1e-3}))


PROJECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "resampler": ("spatial_resampler", {}),
    "mlp": ("mlp2x_gelu", {"strategy": "pad", "layout": "flat"}),
    "newline": (
        "mlp2x_gelu",
        {"strategy": "anyres", "layout": "unpad", "pinpoints": [[32, 64], [64, 32], [64, 64]]},
    ),
}


@pytest.mark.parametrize("name", PROJECTORS)
def test_adapters_in_a_projector(tmp_path: Path, name: str) -> None:
    kind, image = PROJECTORS[name]
    parts = tiny_parts(projector={"type": kind}, image=image)
    trained = adapted(tmp_path / "base", tmp_path / "lora", parts, extra_targets=r"projector\..*")
    assert {path for path in adapted_layers(trained[0]) if path.startswith("projector.")}
    learned = load_file(tmp_path / "lora/non_lora_trainables.safetensors")
    assert ("image_newline" in learned) == (name == "newline")
    assert difference(trained, load_pretrained(tmp_path / "lora")) <= CLOSE


def test_what_learns_is_counted() -> None:
    model, _ = tiny_parts()
    total = sum(parameter.numel() for parameter in model.language_model.parameters())
    add_adapters(model, LoraSection(r=2))
    stage = StageConfig(learn={"projector": 1e-3, "language_model": None})
    apply_stage(model, stage)
    reports = {report.name: report for report in part_reports(model, stage, 2e-4)}
    report = reports["language_model (LoRA)"]
    widths = {"q": (64, 64), "k": (64, 32), "v": (64, 32), "o": (64, 64)}
    widths |= {"gate": (64, 96), "up": (64, 96), "down": (96, 64)}
    adapters = 2 * sum(2 * (wide + high) for wide, high in widths.values())
    assert (report.learning, report.total) == (adapters, total + adapters)
    assert report.rate == 2e-4
    assert reports["vision_tower"].learning == 0


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("lora_only", 4), ("all", 6)])
def test_biases(bias: str, count: int) -> None:
    """Only the queries, keys and values of Qwen2 have any."""
    model, _ = tiny_parts(text=LANGUAGES["qwen2"])
    section = LoraSection(r=2, targets=["q_proj", "v_proj"], bias=bias)
    add_adapters(model, section)
    apply_stage(model, StageConfig(learn={"language_model": None}))
    learn_biases(model, section)
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum(name.endswith(".bias") for name in learning) == count
    assert not [name for name in learning if not name.startswith("language_model.")]


def test_trained_biases_are_kept(tmp_path: Path) -> None:
    model, processor = tiny_parts(text=LANGUAGES["qwen2"])
    save(tmp_path / "base", (model, processor))
    section = LoraSection(r=2, targets="q_proj", bias="all")
    add_adapters(model, section)
    apply_stage(model, StageConfig(learn={"language_model": None}))
    learn_biases(model, section)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.linspace(0, 0.2, parameter.shape[-1]))
    (tmp_path / "lora").mkdir()
    save_lora(tmp_path / "lora", model, processor, model.state_dict(), str(tmp_path / "base"))
    for merge in (True, False):
        loaded = load_pretrained(tmp_path / "lora", merge_lora=merge)
        assert difference((model.eval(), processor), loaded) <= CLOSE
