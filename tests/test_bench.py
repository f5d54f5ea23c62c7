"""Cost formulas against real modules and real counts; plain forms against ours; the commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_uhd.bench import encode
from llava_uhd.bench.__main__ import COMMANDS, main
from llava_uhd.bench.cost import PRESETS, preset_model
from llava_uhd.bench.plain import resample, roi_align, sampled_roi_align
from llava_uhd.bench.timing import LiveBytes, Variant, compare
from llava_uhd.checkpoint.shapes import (
    KNOWN_LANGUAGE_MODELS,
    describe_checkpoint,
    describe_recipe,
    known_model,
)
from llava_uhd.config.model import LlavaUHDConfig, make_config
from llava_uhd.config.recipe import list_recipes, load_recipe
from llava_uhd.errors import UserError
from llava_uhd.images.cost import (
    PUBLISHED,
    Convention,
    count_parameters,
    image_cost,
    language_shape,
    tower_flops,
    tower_shape,
)
from llava_uhd.images.geometry import SlicePlan, plan_slices
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.projectors import build_projector
from llava_uhd.projectors.pooling import pool_windows


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def tiny_config(**text: Any) -> LlavaUHDConfig:
    return LlavaUHDConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 50,
            **text,
        },
        projector={"num_queries": 16, "num_heads": 2},
    )


# Parameters, and weights that every token passes, derived by hand.
KNOWN = {
    "vicuna-7b-v1.5": (6_738_415_616, 6_476_005_376),
    "vicuna-13b-v1.5": (13_015_864_320, 12_687_769_600),
    "qwen2-7b": (7_615_616_512, 6_525_288_448),
    "qwen2-0.5b": (494_032_768, 357_826_560),
}


@pytest.mark.parametrize("name", KNOWN)
def test_language_parameters(name: str) -> None:
    config = make_config(KNOWN_LANGUAGE_MODELS[name], name)
    shape = language_shape(config)
    assert (shape.parameters, shape.body_weights) == KNOWN[name]


@pytest.mark.parametrize("name", ["vicuna-7b-v1.5", "qwen2-0.5b-instruct"])
@pytest.mark.parametrize("queries", [64, 144])
def test_parameters_equal_the_built_modules(name: str, queries: int) -> None:
    config = known_model(name, queries)
    with torch.device("meta"):
        model = LlavaUHDForConditionalGeneration(config)
    counted = count_parameters(config)
    assert counted.built_tower == count(model.vision_tower)
    assert counted.projector == count(model.projector)
    assert counted.language == count(model.language_model)
    assert counted.tower == 303_507_456


@pytest.mark.parametrize(
    "text",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "qwen3", "head_dim": 24},
        {"model_type": "mistral"},
    ],
)
def test_parameters_of_other_families(text: dict[str, Any]) -> None:
    config = tiny_config(**text)
    model = LlavaUHDForConditionalGeneration(config)
    assert count_parameters(config).language == count(model.language_model)
    assert count_parameters(config).total == count(model)


def test_known_parameters() -> None:
    # 88.7 M and 137.1 M without the position table.
    for size, width, expected in (("7b", 4096, 88.7e6), ("13b", 5120, 137.1e6)):
        projector = count_parameters(preset_model(f"uhd144-{size}")).projector
        assert projector - 144 * width == pytest.approx(expected, rel=1e-3)
    assert count_parameters(preset_model("llava15-7b")).projector == 20_979_712
    assert count_parameters(preset_model("llava15-13b")).projector == 31_467_520
    siglip = known_model("qwen2-7b", None, "siglip-so400m-patch14-384")
    assert count_parameters(siglip).tower == 412_987_248


def counted_flops(run: Any) -> int:
    # The counter does not know the fused attention of a CPU.
    plain = sdpa_kernel(SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def test_flops_equal_a_real_count() -> None:
    """Everything that the counter sees is what the formulas say, part by part."""
    config = tiny_config()
    model = LlavaUHDForConditionalGeneration(config).eval()
    grids = [(8, 8), (5, 9), (8, 8), (12, 4)]
    patches = sum(rows * columns for rows, columns in grids)
    pixels, view_grids = torch.randn(patches, 192), torch.tensor(grids)
    assert counted_flops(lambda: model.vision_tower(pixels, view_grids)) == tower_flops(
        config, grids
    )
    features = torch.randn(patches, 32)
    plan = SlicePlan((9, 9), (32, 96), (3, 1), (216, 64), (72, 64), 3, patch_size=8)
    assert plan.view_grids == [(8, 9)] * 3 + [(12, 4)]
    cost = image_cost(config, plan)
    patches = sum(rows * columns for rows, columns in plan.view_grids)
    features, view_grids = torch.randn(patches, 32), torch.tensor(plan.view_grids)
    counted = counted_flops(lambda: model.projector(features, view_grids))
    assert cost.projector == counted
    published = image_cost(config, plan, 0, PUBLISHED)
    counted = counted_flops(lambda: resample(model.projector, features, plan.view_grids))
    assert published.projector == counted
    ids = torch.randint(0, 50, (1, cost.positions + 5))
    model.set_attn_implementation("eager")
    with_text = image_cost(config, plan, 5, PUBLISHED)
    assert with_text.positions == ids.shape[1]
    counted = counted_flops(lambda: model(input_ids=ids))
    # Rotary embeddings multiply positions by frequencies, which the formula leaves out.
    assert 0 <= counted - with_text.language <= 2 * ids.shape[1] * 8
    last = image_cost(config, plan, 5, Convention(causal=False))
    counted = counted_flops(lambda: model(input_ids=ids, logits_to_keep=1))
    assert 0 <= counted - last.language <= 2 * ids.shape[1] * 8


def test_reproduces_the_published_table() -> None:
    square = SlicePlan((336, 336), (336, 336))
    config = preset_model("llava15-13b")
    cost = image_cost(config, square, 0, PUBLISHED)
    assert cost.total == pytest.approx(15.50e12, rel=0.005)
    assert cost.total == pytest.approx(15.495e12, rel=1e-4)
    assert cost.tower == pytest.approx(0.3819e12, rel=1e-3)
    assert cost.language == pytest.approx((14.6163 + 0.2718 + 0.1887) * 1e12, rel=1e-4)
    hooked = Convention(
        causal=False,
        all_logits=True,
        whole_tower=True,
        published_projector=True,
        attention_inputs=False,
    )
    plan = plan_slices(672, 1008)
    few = image_cost(preset_model("uhd64-13b"), plan, 0, hooked)
    assert few.positions == 454
    assert few.total / cost.total == pytest.approx(0.94, abs=0.005)
    many = image_cost(preset_model("uhd144-13b"), plan, 0, PUBLISHED)
    assert many.positions == 1014 and many.total / cost.total == pytest.approx(1.98, abs=0.01)
    without = image_cost(preset_model("uhd144-13b"), plan, 0, PUBLISHED, separators=False)
    assert without.positions == 1008 and without.total < many.total


def test_known_towers() -> None:
    clip = tower_shape(preset_model("uhd144-7b").vision_config)
    assert clip.flops(576, 23) == pytest.approx(366.0e9, rel=1e-3)
    siglip = tower_shape(known_model("qwen2-7b", None, "siglip-so400m-patch14-384").vision_config)
    assert siglip.flops(729, 26) == pytest.approx(641.8e9, rel=1e-3)


def test_unknown_shapes_are_named() -> None:
    with pytest.raises(UserError, match="no cost formula for language model 'gpt2'"):
        language_shape(make_config({"model_type": "gpt2"}, "text"))
    with pytest.raises(UserError, match="no cost formula for vision tower 'vit'"):
        tower_shape(make_config({"model_type": "vit"}, "vision"))
    with pytest.raises(UserError, match="its shape is not known"):
        known_model("vicuna-70b", 144)


def test_published_checkpoint_folder(golden: Path) -> None:
    config = describe_checkpoint(golden / "uhd_v1/tiny_checkpoint")
    model = LlavaUHDForConditionalGeneration(config)
    assert count_parameters(config).total == count(model)
    assert config.hidden_size == 128 and config.projector.num_queries == 144


def test_every_recipe_has_a_cost() -> None:
    names = list_recipes()
    assert len(names) >= 4
    for name in names:
        config = describe_recipe(load_recipe(name, debug=True))
        assert image_cost(config, plan_slices(200, 100, 7, 64, 8)).total > 0
    config = describe_recipe(load_recipe("uhd_v1/finetune_vicuna13b"))
    assert config.hidden_size == 5120 and config.projector.num_queries == 144


@pytest.mark.parametrize("grid", [(24, 24), (36, 16), (19, 29), (53, 12), (14, 100)])
def test_plain_pooling_equals_ours(grid: tuple[int, int]) -> None:
    feature_map = torch.randn(*grid, 5, generator=torch.Generator().manual_seed(0))
    ours = pool_windows(feature_map[None], 12)[:, 0].transpose(1, 2)
    first = feature_map.permute(2, 0, 1).contiguous()
    for form in (roi_align, sampled_roi_align):
        assert (form(first, 12).flatten(2) - ours).abs().max() < 2e-5, form


def test_plain_resampler_equals_the_published_one(golden: Path) -> None:
    tensors = load_file(golden / "uhd_v1/resampler_d128.safetensors")
    module = build_projector(
        LlavaUHDConfig(
            {"model_type": "clip_vision_model", "hidden_size": 64, "num_attention_heads": 1},
            {"model_type": "llama", "hidden_size": 128, "num_attention_heads": 1},
        )
    )
    prefix = "weights."
    weights = {k[len(prefix) :]: v.float() for k, v in tensors.items() if k.startswith(prefix)}
    module.load_state_dict(weights)
    for grid in ((24, 24), (6, 40), (16, 36)):
        rows, columns = grid
        out = resample(module, tensors["input_base"][0, : rows * columns], [grid])
        expected = tensors[f"output.{rows}x{columns}"][0]
        assert (out - expected).abs().max() <= 2e-5, grid


def test_live_bytes() -> None:
    base = torch.zeros(1000)
    with LiveBytes() as counter:
        first = base + 1  # 4000 bytes
        view = first[:10]
        first.add_(1)
        second = first * 2  # 8000 bytes alive
        del first, view, second
        base.clone()
    assert counter.peak == 8000
    assert counter.live == 0


def test_comparison() -> None:
    x = torch.linspace(1, 2, 500)
    calls: list[str] = []

    def slow() -> torch.Tensor:
        calls.append("slow")
        return sum(((x * 1.0) for _ in range(3000)), torch.zeros(500)) / 3000

    def fast() -> list[torch.Tensor]:
        calls.append("fast")
        return [x + 0.5]

    result = compare(
        "test", {"slow": Variant(slow), "fast": Variant(fast, lambda parts: parts[0])}, repeats=4
    )
    first, second = result.rows
    assert result.speedup(first) == 1 and result.speedup(second) > 5
    assert second.error == pytest.approx(0.5, rel=1e-3)
    assert second.relative_error == pytest.approx(0.25, rel=1e-3) == result.worst_error
    assert second.peak_bytes == 2000
    assert calls[-8:] == ["slow", "fast", "fast", "slow"] * 2  # in turns
    with pytest.raises(ValueError, match="shape"):
        compare("test", {"a": Variant(slow), "b": Variant(lambda: x[:3])})


def bench(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    return main()


def test_encode_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    words = ("encode", "--preset", "tiny", "--repeats", "2", "--device", "cpu")
    assert bench(monkeypatch, *words, "--json", str(file)) == 0
    printed = capsys.readouterr().out
    assert "window pooling" in printed and "Equal within" in printed
    figures = json.loads(file.read_text())
    assert figures["passed"] and figures["views"] == [[8, 8]] * 6 + [[6, 9]]
    titles = [each["title"] for each in figures["comparisons"]]
    assert titles == ["vision tower", "window pooling", "whole resampler"]
    pooling = {row["name"]: row for row in figures["comparisons"][1]["rows"]}
    assert pooling["separable, keys and values"]["speedup"] > 2
    assert all(row["peak_bytes"] > 0 for row in pooling.values())
    monkeypatch.setattr(encode, "ERROR_BOUND", 0.0)
    assert bench(monkeypatch, *words) == 1
    assert "FAILED" in capsys.readouterr().out


def test_cost_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    words = ("--recipe", "uhd_v1/finetune_vicuna7b", "--text-tokens", "40", "--json", str(file))
    assert bench(monkeypatch, "cost", *words) == 0
    printed = capsys.readouterr().out
    assert "FLOP = 2 multiply-adds" in printed and "6,738,415,616" in printed
    assert '"94 %"' in printed and "64-query" in printed
    figures = json.loads(file.read_text())
    assert figures["model"]["flops"]["positions"] == 1014 + 40
    assert [each["preset"] for each in figures["systems"]] == PRESETS
    assert bench(monkeypatch, "cost", "--image", "336x336") == 0
    printed = capsys.readouterr().out
    assert "15.50 (100%)" in printed


def test_bad_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("encode", "--image", "12"), ("cost", "--preset", "x"), ("nothing",)):
        with pytest.raises(SystemExit) as stopped:
            bench(monkeypatch, *words)
        assert stopped.value.code == 2
    assert "WIDTHxHEIGHT" in capsys.readouterr().err
    for words in (
        ("encode", "--repeats", "0"),
        ("encode", "--width", "100"),
        ("cost", "--text-tokens", "-1"),
        ("cost", "--recipe", "uhd_v1/fintune_vicuna7b"),
        ("cost", "--checkpoint", "no/such/folder"),
    ):
        with pytest.raises(UserError):
            bench(monkeypatch, *words)
    with pytest.raises(UserError, match="checkpoint nowhere is not here.*train it first"):
        describe_checkpoint("nowhere")


def test_every_command_registers() -> None:
    assert {module.__name__.rpartition(".")[2] for module in COMMANDS} >= {"encode", "cost"}
