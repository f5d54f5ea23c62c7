"""The Hiwin projector: goldens, small views, half precision, parameters, cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fixtures_hiwin import MIXED, Grid, HiwinInputs, make_config, make_hiwin, views
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from llava_uhd.errors import UserError
from llava_uhd.images.cost import PUBLISHED, Convention
from llava_uhd.images.cost_projectors import PROJECTOR_COSTS
from llava_uhd.projectors import build_projector
from llava_uhd.projectors.hiwin import HiwinProjector
from llava_uhd.projectors.hiwin_plain import window_tokens
from llava_uhd.projectors.hiwin_weights import NUM_SETS, whole_images


def golden_views(golden: Path) -> tuple[dict[str, torch.Tensor], HiwinInputs]:
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


def test_known_operations() -> None:
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
