"""The Hiwin projector: goldens, the fast form against the plain one, gradients, small views."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.images.cost import PUBLISHED, Convention
from llava_uhd.images.cost_projectors import PROJECTOR_COSTS
from llava_uhd.projectors import build_projector, hiwin_fast, pooling
from llava_uhd.projectors.hiwin import HiwinProjector
from llava_uhd.projectors.hiwin_fast import gram_pays
from llava_uhd.projectors.hiwin_plain import window_tokens
from llava_uhd.projectors.hiwin_weights import NUM_SETS, whole_images
from llava_uhd.projectors.pooling import pool_table, pool_windows
from llava_uhd.vision.position import resample_positions

Grid = tuple[int, int]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
PATCH = 4
MIXED = [(4, 6), (4, 6), (5, 3), (3, 3), (4, 6), (2, 7)]


def make_config(kv_width: int, width: int, **projector: object) -> LlavaUHDConfig:
    return LlavaUHDConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": kv_width,
            "num_attention_heads": 1,
        },
        text_config={"model_type": "llama", "hidden_size": width, "num_attention_heads": 1},
        projector={"type": "hiwin", "num_queries": 16, "num_heads": 2, **projector},
    )


def make_hiwin(kv_width: int = 8, width: int = 32, **projector: object) -> HiwinProjector:
    """A small projector whose parameters are all at random values."""
    module = build_projector(make_config(kv_width, width, **projector))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            random = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + random if name.endswith("sigma_spatial") else random)
    assert isinstance(module, HiwinProjector)
    return module.eval()


def views(grids: list[Grid], kv_width: int = 8, seed: int = 0) -> Inputs:
    """Features, grids and pixels; the features share a large common part, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(rows * columns for rows, columns in grids)
    features = torch.randn(count, kv_width, generator=generator)
    features = features + 2 * torch.randn(kv_width, generator=generator)
    pixels = torch.randn(count, 3 * PATCH**2, generator=generator)
    return features, torch.tensor(grids), pixels


def golden_views(golden: Path) -> tuple[dict[str, torch.Tensor], Inputs]:
    """The recorded tensors, and the inputs of all six views packed."""
    tensors = load_file(golden / "uhd_v2/hiwin_mixed.safetensors")
    facts = json.loads((golden / "uhd_v2/hiwin_mixed.json").read_text())
    side = facts["pixels_per_patch"]
    features, pixels = [], []
    for index, (rows, columns) in enumerate(facts["patch_sizes"]):
        features.append(tensors["features"][index, : rows * columns])
        image = tensors[f"image.{index}"].unflatten(2, (columns, side)).unflatten(1, (rows, side))
        patches = image.permute(1, 3, 0, 2, 4).flatten(0, 1).flatten(1)  # (patches, 3 * p * p)
        assert torch.equal(
            whole_images(patches[None], (rows, columns))[0], tensors[f"image.{index}"]
        )
        pixels.append(patches)
    grids = torch.tensor(facts["patch_sizes"])
    return tensors, (torch.cat(features), grids, torch.cat(pixels))


def golden_projector(golden: Path, mask: int, form: str) -> HiwinProjector:
    scales = [scale for scale in (1, 2, 4, 8) if mask & scale]
    module = build_projector(
        make_config(24, 64, scales=scales, form=form, num_queries=144, num_heads=4)
    )
    published = load_file(golden / "uhd_v2/hiwin_weights.safetensors")
    names = {
        name: name.replace("upsampler.", "upsampler.upsampler.") for name in module.state_dict()
    }
    module.load_state_dict({ours: published[theirs] for ours, theirs in names.items()})
    assert isinstance(module, HiwinProjector)
    return module.eval()


@pytest.mark.parametrize("form", ["plain", "fast"])
@pytest.mark.parametrize("mask", [5, 7])
def test_equals_the_published_module(golden: Path, mask: int, form: str) -> None:
    tensors, inputs = golden_views(golden)
    module = golden_projector(golden, mask, form)
    with torch.no_grad():
        out = module(*inputs)
    expected = tensors[f"mask{mask}.output"]
    torch.testing.assert_close(out.unflatten(0, (6, 144)), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("mask", [5, 7])
def test_published_keys_and_values(golden: Path, mask: int) -> None:
    """The plain form's windows are those of the original, key by key."""
    tensors, (features, grids, pixels) = golden_views(golden)
    module = golden_projector(golden, mask, "plain")
    sizes = [(int(rows), int(columns)) for rows, columns in grids]
    facts = json.loads((golden / "uhd_v2/hiwin_mixed.json").read_text())
    with torch.no_grad():
        keys, values = window_tokens(module, features, pixels, sizes)
    assert [list(key.shape) for key in keys] == facts["group_key_shapes"][str(mask)]
    for name, found in (("keys", keys), ("values", values)):
        expected = tensors[f"mask{mask}.{name}_first_group_window0"]
        torch.testing.assert_close(found[0][:2], expected, atol=2e-5, rtol=1e-4)


def both_forms(module: HiwinProjector, inputs: Inputs) -> Iterator[dict[str, torch.Tensor]]:
    """Outputs and gradients of the plain, then of the fast form."""
    for form in ("plain", "fast"):
        module.form = form
        module.zero_grad()
        features = inputs[0].clone().requires_grad_()
        out = module(features, *inputs[1:])
        torch.sin(3 * out).sum().backward()
        found = {"output": out.detach(), "features": features.grad}
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            found[f"gradient of {name}"] = parameter.grad.clone()
        yield found


def assert_forms_agree(module: HiwinProjector, inputs: Inputs) -> None:
    plain, fast = both_forms(module, inputs)
    assert plain.keys() == fast.keys() and len(plain) > 20
    overall = max(float(value.abs().max()) for value in plain.values())
    for name, expected in plain.items():
        bound = 1e-5 if name == "output" else 1e-4
        largest = float(expected.abs().max())
        if largest < 1e-6 * overall:  # its true value is zero: only rounding is seen
            assert float(fast[name].abs().max()) < 1e-6 * overall, name
        else:
            assert float((fast[name] - expected).abs().max()) <= bound * largest, name


SWEEP = [
    ((1,), 16, MIXED),
    ((2,), 16, [(3, 4), (4, 3)]),
    ((4,), 16, [(3, 4)]),
    ((8,), 16, [(2, 3), (3, 2)]),
    ((1, 2), 64, [(5, 7), (5, 7)]),
    ((1, 4), 144, [(6, 5), (4, 4)]),
    ((1, 2, 4), 16, MIXED),
    ((1, 2, 4, 8), 9, [(2, 3)]),
]


@pytest.mark.parametrize(("scales", "num_queries", "grids"), SWEEP, ids=str)
@pytest.mark.parametrize("width", [16, 32])
def test_forms_agree(
    scales: tuple[int, ...], num_queries: int, grids: list[Grid], width: int
) -> None:
    module = make_hiwin(8, width, scales=scales, num_queries=num_queries)
    assert_forms_agree(module, views(grids))


@pytest.mark.parametrize("gram", [True, False])
def test_cost_rule_changes_no_number(monkeypatch: pytest.MonkeyPatch, gram: bool) -> None:
    module, inputs = make_hiwin(scales=(1, 4)), views(MIXED)
    monkeypatch.setattr(hiwin_fast, "gram_pays", lambda *sizes: gram)
    square = torch.eye(32)
    assert (hiwin_fast.scale_matrices(module, 4, 1, square, square).gram is not None) == gram
    assert_forms_agree(module, inputs)


def test_forms_agree_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """One view, one window and few cells at a time give the same."""
    module, inputs = make_hiwin(scales=(1, 2)), views(MIXED)
    expected = list(both_forms(module, inputs))[1]
    monkeypatch.setattr(hiwin_fast, "MIXED_ELEMENTS", 1)
    monkeypatch.setattr(hiwin_fast, "CPU_CELLS", 5)
    monkeypatch.setattr("llava_uhd.projectors.hiwin_weights.CPU_ELEMENTS", 1)
    found = list(both_forms(module, inputs))[1]
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-4 * value.abs().max() + 1e-5, name


@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    st.sampled_from([(1,), (2,), (1, 2), (1, 4)]),
    st.sampled_from([1, 4, 9]),
)
def test_forms_agree_on_anything(
    grids: list[Grid], scales: tuple[int, ...], num_queries: int
) -> None:
    module = make_hiwin(scales=scales, num_queries=num_queries)
    assert_forms_agree(module, views(grids))


@settings(max_examples=10)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=5))
def test_packed_equals_one_by_one(grids: list[Grid]) -> None:
    module = make_hiwin(scales=(1, 2))
    features, view_grids, pixels = views(grids)
    lengths = [rows * columns for rows, columns in grids]
    with torch.no_grad():
        packed = module(features, view_grids, pixels)
        parts = zip(features.split(lengths), view_grids.split(1), pixels.split(lengths))
        alone = torch.cat([module(*part) for part in parts])
    assert packed.shape == (16 * len(grids), 32)
    assert (packed - alone).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 1), (2, 2)])
@pytest.mark.parametrize("form", ["plain", "fast"])
def test_views_too_small_to_pad(grid: Grid, form: str) -> None:
    module = make_hiwin(scales=(1, 2, 4), num_queries=144, form=form)
    out = module(*views([grid]))
    assert out.shape == (144, 32) and bool(out.isfinite().all())
    out.sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("form", ["plain", "fast"])
def test_half_precision(form: str) -> None:
    inputs = views(MIXED)
    module = make_hiwin(scales=(1, 2, 4))
    full = module(*inputs).detach()
    half = make_hiwin(scales=(1, 2, 4), form=form).bfloat16()
    out = half(inputs[0].bfloat16(), inputs[1], inputs[2])
    assert out.dtype == torch.bfloat16
    assert (out - full).abs().mean() < 0.02 * full.abs().max()
    out.float().square().sum().backward()
    for name, parameter in half.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


def test_autocast() -> None:
    """Float32 parameters under automatic mixed precision, as the trainer runs them."""
    module, inputs = make_hiwin(scales=(1, 4)), views(MIXED)
    full = module(*inputs).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(*inputs)
        out.float().square().sum().backward()
    assert (out - full).abs().mean() < 0.02 * full.abs().max()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("form", ["plain", "fast"])
def test_rounded_boxes(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    features, grids, pixels = views([(5, 7), (7, 9)])
    exact = make_hiwin(scales=(1, 2), form=form)(features, grids, pixels)
    module = make_hiwin(scales=(1, 2), form=form, round_boxes=True)
    # In float32 rounding to the feature dtype leaves every corner where it is.
    torch.testing.assert_close(module(features, grids, pixels), exact)
    # In bfloat16 every pooling of both forms takes the rounded windows.
    asked: list[torch.dtype | None] = []
    original = pooling.pooling_matrices

    def recorded(*arguments: Any) -> Any:
        asked.append(arguments[3])
        return original(*arguments)

    monkeypatch.setattr(pooling, "pooling_matrices", recorded)
    for cache in (pooling._placed_matrices, pooling._table_matrices):
        cache.cache_clear()
    module.bfloat16()(features.bfloat16(), grids, pixels)
    assert asked and set(asked) == {torch.bfloat16}
    asked.clear()
    module.round_boxes = False
    module(features.bfloat16(), grids, pixels)
    assert asked and set(asked) == {None}


def test_frozen_upsampler_keeps_no_graph() -> None:
    module = make_hiwin(scales=(1, 4))
    module.upsampler.requires_grad_(False)
    features, grids, pixels = views([(4, 4)])
    maps = module.feature_maps(features[None], pixels[None], (4, 4))
    assert not any(each.requires_grad for each in maps.values())
    expected = make_hiwin(scales=(1, 4))
    for each in (module, expected):
        each(features, grids, pixels).sum().backward()
    for name, parameter in module.named_parameters():
        if not name.startswith("upsampler."):
            reference = expected.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, reference)


def test_positions_and_scales_reach_the_keys() -> None:
    module, inputs = make_hiwin(scales=(1, 2)), views([(4, 5)])
    with torch.no_grad():
        before = module(*inputs)
        for name in ("pos_embed", "feature_2x_embedding", "query_3"):
            parameter = module.get_parameter(name)
            parameter.add_(torch.randn_like(parameter))
            after = module(*inputs)
            assert not torch.allclose(after, before), name
            before = after


@pytest.mark.parametrize("grid", [(24, 24), (7, 20), (1, 3), (12, 12), (48, 96)])
@pytest.mark.parametrize("side", [12, 4])
def test_pooled_table_equals_the_pooled_map(grid: Grid, side: int) -> None:
    table = torch.randn(side**2, 6, generator=torch.Generator().manual_seed(0))
    large = resample_positions(table, grid).unflatten(0, grid)
    expected = pool_windows(large[None], side)[:, 0]
    torch.testing.assert_close(pool_table(table, grid, side), expected, atol=1e-5, rtol=1e-5)
    expected = pool_windows(large[None], side, torch.bfloat16)[:, 0]
    rounded = pool_table(table, grid, side, torch.bfloat16)
    torch.testing.assert_close(rounded, expected, atol=1e-5, rtol=1e-5)


def test_cost_rule() -> None:
    assert gram_pays(9216, 1024, 4096) and gram_pays(1366, 1024, 4096)
    assert not gram_pays(576, 1024, 4096) and not gram_pays(1365, 1024, 4096)
    assert not gram_pays(10**9, 1152, 896)


def test_gram_derivatives() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, wide = (torch.randn(5, 3, generator=generator) for _ in range(2))
    tall = torch.randn(5, generator=generator)

    def through_gram(rows: torch.Tensor, wide: torch.Tensor, tall: torch.Tensor) -> torch.Tensor:
        arguments = (wide.T @ wide, tall @ wide, tall @ tall, 0.1)
        return hiwin_fast._GramDeviation.apply(rows, *arguments)

    def directly(rows: torch.Tensor, wide: torch.Tensor, tall: torch.Tensor) -> torch.Tensor:
        return (F.linear(rows, wide, tall).square().sum(-1) + 0.1).rsqrt()

    inputs = [each.requires_grad_() for each in (rows, wide, tall)]
    slope = torch.randn(5, generator=generator)
    found, expected = through_gram(*inputs), directly(*inputs)
    torch.testing.assert_close(found, expected)
    pairs = zip(*(torch.autograd.grad(each, inputs, slope) for each in (found, expected)))
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_parameters() -> None:
    module = make_hiwin(scales=(1, 4))
    names = set(module.state_dict())
    own = {name for name in names if not name.startswith("upsampler.")}
    scaled = {
        "feature_{}x_embedding",
        "features_{}x_projector.weight",
        "features_{}x_projector.bias",
    }
    assert own == {
        *(f"query_{index}" for index in range(1, NUM_SETS + 1)),
        *(name.format(scale) for name in scaled for scale in (1, 4)),
        *(
            f"{norm}.{part}"
            for norm in ("ln_q", "ln_kv", "ln_proj", "ln_post")
            for part in ("weight", "bias")
        ),
        *("attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"),
        *("pos_embed", "proj", "cat_proj.weight", "cat_proj.bias"),
    }
    assert "upsampler.up2.range_temp" in names and "upsampler.fixup_proj.1.weight" in names
    assert not hasattr(make_hiwin(scales=(1,)), "upsampler")
    assert {
        module.grid_size**2 for module in (make_hiwin(num_queries=q) for q in (64, 144, 256))
    } == {64, 144, 256}


def test_heads_follow_the_width() -> None:
    config = make_config(8, 256)
    config.projector.num_heads = None
    assert build_projector(config).attn.num_heads == 2
    config = make_config(8, 64)
    config.projector.num_heads = None
    assert build_projector(config).attn.num_heads == 1


def test_refusals() -> None:
    with pytest.raises(UserError, match="square number"):
        build_projector(make_config(8, 16, num_queries=150))
    with pytest.raises(UserError, match="heads"):
        build_projector(make_config(8, 18))
    features, grids, _ = views([(3, 4)])
    with pytest.raises(ValueError, match="pixel_values"):
        make_hiwin(scales=(1, 2))(features, grids)
    assert make_hiwin(scales=(1,))(features, grids).shape == (16, 32)


def test_training_after_inference() -> None:
    module, inputs = make_hiwin(scales=(1, 2), num_queries=25), views([(5, 9)])
    with torch.inference_mode():
        module(*inputs)
    module(*inputs).sum().backward()
    assert module.pos_embed.grad is not None and bool(module.pos_embed.grad.any())


@pytest.mark.parametrize("scales", [(1,), (1, 2), (1, 4), (2, 8)])
def test_cost_formula(scales: tuple[int, ...]) -> None:
    """Parameters exactly; operations as counted, small terms of one channel left out."""
    config = make_config(32, 128, scales=scales, num_heads=4)
    module = build_projector(config)
    formula = PROJECTOR_COSTS.get("hiwin")
    assert formula.parameters(config) == sum(each.numel() for each in module.parameters())
    module = make_hiwin(32, 128, scales=scales, num_heads=4)
    sizes = [(6, 6), (6, 6), (4, 7), (6, 6)]
    inputs = views(sizes, 32)

    def count(stack_only: bool) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            if not stack_only:
                module(*inputs)
                return counter.get_total_flops()
            parts = [rows * columns for rows, columns in sizes]
            for grid, *both in zip(sizes, inputs[0].split(parts), inputs[2].split(parts)):
                module.feature_maps(both[0][None], both[1][None], grid)
        return counter.get_total_flops()

    counted = count(False) - (count(True) if max(scales) > 1 else 0)
    predicted = formula.flops(config, sizes, Convention()) - formula.upsampler_flops(config, sizes)
    assert counted == pytest.approx(predicted, rel=0.02)
    stack = {1: 0, 2: 1_055_833, 4: 1_062_066, 8: 4_217_099}[max(scales)]
    config.vision_config.hidden_size = 1024
    without = make_config(1024, 128, scales=(1,), num_heads=4)
    extra = (len(scales) - 1) * (1024 * 128 + 2 * 128)
    assert formula.parameters(config) - formula.parameters(without) - extra == stack


def test_fact_sheet_operations() -> None:
    """7 views of 24x24 at D = 4096, scales 1, 2, 4: 8.60 TFLOPs as published."""
    config = make_config(1024, 4096, scales=(1, 2, 4), num_queries=144, num_heads=None)
    grids = [(24, 24)] * 7
    formula = PROJECTOR_COSTS.get("hiwin")
    own = formula.upsampler_flops(config, grids)
    published = formula.flops(config, grids, PUBLISHED)
    assert published == pytest.approx(8.60e12, rel=0.001)
    assert own == pytest.approx(7 * 0.020e12, rel=0.1)
    ours = formula.flops(config, grids, Convention())
    tower = 7 * 0.366e12
    assert published > 3.3 * tower and ours < 0.41 * tower
