"""The upsampler stacks against the original, and what training and inference ask of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from llava_uhd.vision.upsampler import JBUStage, UpsamplerStack, stack_scale

GOLDENS = {"jbu_2x": 2, "jbu_4x": 4, "jbu_4x_ragged": 4, "jbu_8x": 8}


def make(scale: int, width: int = 6, seed: int = 0) -> UpsamplerStack:
    torch.manual_seed(seed)
    stack = UpsamplerStack(width, scale)
    stack.reset_weights()
    return stack


def inputs(
    batch: int = 2, width: int = 6, size: tuple[int, int] = (3, 4), pixels: int = 14
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(batch, width, *size, generator=generator)
    guidance = torch.randn(batch, 3, size[0] * pixels, size[1] * pixels, generator=generator)
    return source, guidance


def load(file: Path, scale: int) -> tuple[UpsamplerStack, dict[str, torch.Tensor]]:
    tensors = load_file(file)
    stack = UpsamplerStack(tensors["source"].shape[1], scale)
    stack.load_state_dict({key[2:]: each for key, each in tensors.items() if key[:2] == "w."})
    return stack.eval(), tensors


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize("learn", [False, True])
def test_original(golden: Path, name: str, learn: bool) -> None:
    """With gradients and without: without them the last convolution works in place."""
    stack, tensors = load(golden / f"uhd_v2/{name}.safetensors", GOLDENS[name])
    source, guidance = tensors["source"], tensors["guidance"]
    with torch.set_grad_enabled(learn):
        found = {"forward": stack.final_map(source, guidance)}
        for scale, maps in stack(source, guidance).items():
            found[f"internal.feat{scale}x"] = maps
        for scale, maps in stack.stage_maps(source, guidance).items():
            found[f"stageloss.feat{scale}x"] = maps
    checked = set()
    for key, maps in found.items():
        if key in tensors:
            torch.testing.assert_close(maps, tensors[key], atol=2e-5, rtol=1e-4)
            checked.add(key)
    results = ("forward", "internal", "stageloss")
    assert checked == {key for key in tensors if key.startswith(results)}


@pytest.mark.parametrize("name", GOLDENS)
def test_original_first_stage(golden: Path, name: str) -> None:
    stack, tensors = load(golden / f"uhd_v2/{name}.safetensors", GOLDENS[name])
    stage = stack.stages()[2]
    small = tensors["up1.small_guidance"]
    pooled = F.adaptive_avg_pool2d(tensors["guidance"], small.shape[2:])
    torch.testing.assert_close(pooled, small, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        alike = stage.range_kernel(small)
        spatial = stage.spatial_kernel(torch.float32)
        product = alike * spatial
        found = {
            "range_kernel": alike.permute(0, 3, 1, 2),
            "spatial_kernel": spatial.reshape(1, 49, 1, 1),
            "normalised_kernel": (product / product.sum(-1, keepdim=True)).permute(0, 3, 1, 2),
            "output": stage(tensors["source"].permute(0, 2, 3, 1), small).permute(0, 3, 1, 2),
        }
    for key, value in found.items():
        expected = tensors.get(f"up1.{key}")
        if expected is not None:
            value = value[: len(expected)]
            torch.testing.assert_close(value, expected, atol=2e-5, rtol=1e-4, msg=key)


def test_original_gradients(golden: Path) -> None:
    stack, tensors = load(golden / "uhd_v2/jbu_4x_stageloss_grads.safetensors", 4)
    maps = stack.stage_maps(tensors["source"], tensors["guidance"])
    loss = sum((each * tensors[f"weight{scale}x"]).sum() for scale, each in maps.items())
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    for scale, each in maps.items():
        torch.testing.assert_close(each, tensors[f"feat{scale}x"], atol=2e-5, rtol=1e-4)
    for name, parameter in stack.named_parameters():
        expected = tensors[f"grad.{name}"]
        torch.testing.assert_close(parameter.grad, expected, atol=2e-5, rtol=1e-4, msg=name)


def test_published_sizes() -> None:
    with torch.device("meta"):
        counts = {
            scale: sum(each.numel() for each in UpsamplerStack(1024, scale).parameters())
            for scale in (2, 4, 8)
        }
    assert counts == {2: 1_055_833, 4: 1_062_066, 8: 4_217_099}


def test_stack_scale() -> None:
    assert [stack_scale(each) for each in ((1,), (1, 2), (1, 4), (1, 2, 4), (1, 8), ())] == [
        None,
        2,
        4,
        4,
        8,
        None,
    ]


def test_initial_weights() -> None:
    with torch.device("meta"):
        stack = UpsamplerStack(6, 8)
    stack = stack.to_empty(device="cpu")
    for parameter in stack.parameters():
        torch.nn.init.constant_(parameter, 1e6)
    stack.reset_weights()
    for stage in stack.stages().values():
        assert stage.range_temp.item() == 0 and stage.sigma_spatial.item() == 1
    for name, parameter in stack.named_parameters():
        if parameter.dim():
            assert 0 < parameter.abs().max() <= 1, name
    assert stack.fixup_proj[1].weight.std().item() == pytest.approx((3 * 6) ** -0.5, rel=0.3)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_constant_maps_stay_constant(scale: int) -> None:
    """Without corrections a kernel sums to one."""
    stack = make(scale)
    for name, parameter in stack.named_parameters():
        if "fixup" in name:
            torch.nn.init.zeros_(parameter)
    _, guidance = inputs()
    source = torch.arange(6.0)[None, :, None, None].expand(2, 6, 3, 4)
    with torch.no_grad():
        maps = stack(source, guidance)
    assert sorted(maps) == [each for each in (2, 4, 8) if each <= scale]
    for each, value in maps.items():
        expected = torch.arange(6.0)[None, :, None, None].expand(2, 6, 3 * each, 4 * each)
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 4)])
def test_everything_learns(scale: int, size: tuple[int, int]) -> None:
    """On every map, also on the single patch that keeps batches without images in step."""
    stack = make(scale).train()
    source, guidance = inputs(size=size)
    source.requires_grad_()
    guidance.requires_grad_()
    maps = stack(source, guidance)
    assert {each: tuple(value.shape[2:]) for each, value in maps.items()} == {
        each: (each * size[0], each * size[1]) for each in stack.scales
    }
    sum(value.square().mean() for value in maps.values()).backward()  # type: ignore[union-attr]
    for name, parameter in stack.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        idle = scale == 8 and name.startswith("fixup_proj.")  # of `final_map` only
        assert bool(parameter.grad.any()) != idle, name
    assert source.grad is not None and source.grad.any()
    assert guidance.grad is not None and guidance.grad.any()


@pytest.mark.parametrize("scale", [4, 8])
def test_a_stage_is_cut_from_later_losses(scale: int) -> None:
    source, guidance = inputs()
    for detach in (True, False):
        stack = make(scale).eval()
        maps = stack.stage_maps(source, guidance, detach=detach)
        maps[scale].square().sum().backward()
        last = stack.stages()[scale]
        assert last.sigma_spatial.grad is not None
        assert (stack.stages()[2].sigma_spatial.grad is None) == detach


def test_wanted_scales() -> None:
    source, guidance = inputs()
    for scale in (4, 8):
        stack = make(scale).eval()
        with torch.no_grad():
            every = stack(source, guidance)
            for wanted in ({2}, {4}, (2, 4), {scale}):
                some = stack(source, guidance, wanted)
                assert set(some) == set(wanted)
                for each, value in some.items():
                    assert torch.equal(value, every[each])
            assert stack(source, guidance, set()) == {}
    with pytest.raises(ValueError, match=r"a 2x stack makes \(2,\), not \[4\]"):
        make(2)(source, guidance, {4})


def test_maps_do_not_depend_on_the_batch() -> None:
    stack = make(4).eval()
    source, guidance = inputs(batch=3)
    with torch.no_grad():
        together = stack(source, guidance)
        for index in range(3):
            alone = stack(source[index : index + 1], guidance[index : index + 1])
            for scale, value in alone.items():
                torch.testing.assert_close(value[0], together[scale][index])


def test_any_memory_layout() -> None:
    stack = make(4).eval()
    source, guidance = inputs()
    kept = source.clone()
    with torch.no_grad():
        expected = stack(source, guidance)
        last = source.contiguous(memory_format=torch.channels_last)
        strided = torch.randn(2, 6, 3, 8)
        strided[..., ::2] = source
        for given in (last, strided[..., ::2]):
            found = stack(given, guidance.contiguous(memory_format=torch.channels_last))
            for scale, value in found.items():
                torch.testing.assert_close(value, expected[scale])
                assert value.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(source, kept)


def test_frozen_parts_have_no_dropout() -> None:
    source, guidance = inputs()
    stack = make(4).requires_grad_(False)
    expected = stack.eval()(source, guidance)
    stack.train()
    assert not any(module.training for module in stack.modules())
    for scale, value in stack(source, guidance).items():
        assert torch.equal(value, expected[scale])
    # Frozen only after train(), as a stage of training may do.
    late = make(4).train()
    assert late.stages()[2].training
    late.requires_grad_(False)
    for scale, value in late(source, guidance).items():
        assert torch.equal(value, expected[scale])
    # The correction alone learns: no dropout in the frozen stages.
    stack.fixup_proj.requires_grad_(True)
    stack.train()
    assert stack.fixup_proj[0].training and not stack.stages()[4].training
    maps = stack(source, guidance)
    assert torch.equal(maps[2], expected[2])
    assert not torch.equal(maps[4], expected[4])


def test_dropout_while_learning() -> None:
    stack = make(2).train()
    source, guidance = inputs()
    one, other = stack(source, guidance)[2], stack(source, guidance)[2]
    assert not torch.equal(one, other)
    stack.eval()
    assert torch.equal(stack(source, guidance)[2], stack(source, guidance)[2])


def test_nothing_is_kept_without_a_learning_parameter() -> None:
    stack = make(4).requires_grad_(False)
    source, guidance = inputs()
    assert not any(value.requires_grad for value in stack(source, guidance).values())
    source.requires_grad_()
    maps = stack(source, guidance)
    maps[4].square().sum().backward()
    assert source.grad is not None and source.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_dtype(dtype: torch.dtype) -> None:
    source, guidance = inputs()
    with torch.no_grad():
        expected = make(4).eval()(source, guidance)
    stack = make(4).to(dtype).train()
    maps = stack.eval()(source, guidance)  # the maps come in another dtype
    bound = 0.03 if dtype == torch.bfloat16 else 1e-5
    for scale, value in maps.items():
        assert value.dtype == dtype
        assert (value.double() - expected[scale]).abs().max() < bound * expected[scale].abs().max()
    sum(value.square().mean() for value in maps.values()).backward()  # type: ignore[union-attr]
    assert all(each.grad is not None and each.grad.dtype == dtype for each in stack.parameters())
    stage = stack.stages()[2]
    small = F.adaptive_avg_pool2d(guidance, (6, 8)).to(dtype)
    precise = torch.promote_types(dtype, torch.float32)
    assert stage.kernel(small).dtype == precise


def test_under_autocast() -> None:
    stack = make(4).eval()
    source, guidance = inputs()
    with torch.no_grad():
        expected = stack(source, guidance)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = stack(source.bfloat16(), guidance)
    for scale, value in maps.items():
        assert value.dtype == torch.float32
        assert (value - expected[scale]).abs().max() < 0.05 * expected[scale].abs().max()
    maps[4].sum().backward()
    assert all(each.grad is not None for each in stack.parameters())


def test_an_edge_of_the_guidance_stays_sharp() -> None:
    """What a stage is for: pixels mix with those that look alike."""
    stage = JBUStage()
    for parameter in stage.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        stage.sigma_spatial.fill_(1.0)
        # Keys: (gelu(red), gelu(-red)), nearly orthogonal for red = 3 and red = -3.
        stage.range_proj[0].weight[:2, 0, 0, 0] = torch.tensor([1.0, -1.0])
        stage.range_proj[3].weight[:2, :2, 0, 0] = torch.eye(2)
        source = torch.zeros(1, 8, 8, 1)
        source[:, :, 4:] = 1
        image = torch.zeros(1, 3, 16, 16)
        flat = stage(source, image)[0, :, :, 0]
        image[:, 0] = torch.where(torch.arange(16) < 8, -3.0, 3.0)
        edged = stage(source, image)[0, :, :, 0]
    assert (flat[:, 8] - flat[:, 7]).max() < 0.25
    assert (edged[:, 8] - edged[:, 7]).min() > 0.75


def test_wrong_inputs() -> None:
    source, guidance = inputs()
    with pytest.raises(ValueError, match=r"maps \(B, C, h, w\) and images \(B, 3, H, W\)"):
        make(2)(source, guidance[:1])
    with pytest.raises(ValueError, match=r"maps \(B, C, h, w\)"):
        make(2)(source[0], guidance)
    with pytest.raises(ValueError, match="scales 2, 4 and 8, not 16"):
        UpsamplerStack(4, 16)
