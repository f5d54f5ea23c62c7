"""The adaptive convolution against an unfold, against the original, and against itself."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.autograd import gradcheck
from torch.nn import functional as F

from llava_uhd.bench.timing import LiveBytes
from llava_uhd.vision.adaptive_conv import adaptive_conv, upsample_conv, window_products
from llava_uhd.vision.adaptive_conv_plan import Rule, make_axis, reflect, tile_cells

# Odd sizes, one tile, several tiles, tiles that do not fill the map.
SIZES = [(2, 2), (4, 5), (9, 3), (13, 7), (12, 25)]

HAS_TRITON = importlib.util.find_spec("triton") is not None


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def unfolded(padded: torch.Tensor) -> torch.Tensor:
    """(B, C, H + 6, W + 6) to (B, C, H, W, 7, 7), all in memory."""
    batch, channels, height, width = padded.shape
    patches = F.unfold(padded, 7).reshape(batch, channels, 7, 7, height - 6, width - 6)
    return patches.permute(0, 1, 4, 5, 2, 3)


def slow_conv(padded: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    return (unfolded(padded) * kernel[:, None]).sum((-1, -2))


def slow_upsample(source: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    larger = F.interpolate(source.permute(0, 3, 1, 2), scale_factor=2, mode="bicubic")
    padded = F.pad(larger, (3, 3, 3, 3), mode="reflect")
    return slow_conv(padded, kernel).permute(0, 2, 3, 1)


def slow_products(features: torch.Tensor) -> torch.Tensor:
    first = features.permute(0, 3, 1, 2)
    padded = F.pad(first, (3, 3, 3, 3), mode="reflect")
    return (unfolded(padded) * first[..., None, None]).sum(1)


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def test_original(golden: Path) -> None:
    tensors = load_file(golden / "uhd_v2/adaptive_conv.safetensors")
    padded, kernel = leaves(tensors["input"], tensors["filters"])
    output = adaptive_conv(padded, kernel)
    output.backward(tensors["grad_output"])
    found = {"output": output, "grad_input": padded.grad, "grad_filters": kernel.grad}
    for name, value in found.items():
        assert value is not None
        torch.testing.assert_close(value, tensors[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_upsampling_equals_the_unfold(size: tuple[int, int]) -> None:
    height, width = size
    source, kernel = make(2, height, width, 5), make(2, 2 * height, 2 * width, 7, 7, seed=1)
    weights = make(2, 2 * height, 2 * width, 5, seed=2)
    results = []
    for form in (upsample_conv, slow_upsample):
        inputs = leaves(source, kernel)
        output = form(*inputs)
        (output * weights).sum().backward()
        results.append((output, *(each.grad for each in inputs)))
    for ours, slow in zip(*results):
        torch.testing.assert_close(ours, slow, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("size", [(4, 4), (5, 4), (13, 7), (26, 9)])
def test_products_equal_the_unfold(size: tuple[int, int]) -> None:
    features = make(2, *size, 6)
    weights = make(2, *size, 7, 7, seed=1)
    results = []
    for form in (window_products, slow_products):
        (given,) = leaves(features)
        output = form(given)
        (output * weights).sum().backward()
        results.append((output, given.grad))
    for ours, slow in zip(*results):
        torch.testing.assert_close(ours, slow, atol=1e-11, rtol=1e-11)


def test_true_gradients() -> None:
    source, kernel = leaves(make(1, 3, 2, 2), make(1, 6, 4, 7, 7, seed=1))
    assert gradcheck(upsample_conv, (source, kernel), fast_mode=True)
    padded, kernel = leaves(make(2, 2, 8, 9), make(2, 2, 3, 7, 7, seed=1))
    assert gradcheck(adaptive_conv, (padded, kernel), fast_mode=True)
    (features,) = leaves(make(1, 4, 5, 2))
    assert gradcheck(window_products, (features,), fast_mode=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (3, 1)])
def test_maps_too_small_for_the_frameworks_padding(size: tuple[int, int]) -> None:
    """Reflected again and again, as in numpy."""
    height, width = size
    source, kernel = make(1, height, width, 3), make(1, 2 * height, 2 * width, 7, 7, seed=1)
    larger = F.interpolate(source.permute(0, 3, 1, 2), scale_factor=2, mode="bicubic")
    reach = ((0, 0), (0, 0), (3, 3), (3, 3))
    padded = torch.from_numpy(np.pad(larger.numpy(), reach, mode="reflect"))
    expected = slow_conv(padded, kernel).permute(0, 2, 3, 1)
    torch.testing.assert_close(upsample_conv(source, kernel), expected)
    padded = torch.from_numpy(np.pad(source.permute(0, 3, 1, 2).numpy(), reach, mode="reflect"))
    expected = (unfolded(padded) * source.permute(0, 3, 1, 2)[..., None, None]).sum(1)
    torch.testing.assert_close(window_products(source), expected)
    given = leaves(source, kernel)
    assert gradcheck(upsample_conv, given, fast_mode=True)


def test_reflect() -> None:
    assert [reflect(index, 4) for index in range(-3, 7)] == [3, 2, 1, 0, 1, 2, 3, 2, 1, 0]
    assert [reflect(index, 2) for index in range(-3, 5)] == [1, 0, 1, 0, 1, 0, 1, 0]
    assert [reflect(index, 1) for index in (-2, 0, 3)] == [0, 0, 0]


def test_tiles() -> None:
    assert [tile_cells(cells, 6) for cells in (1, 6, 7, 24, 27)] == [1, 6, 4, 6, 6]
    whole = make_axis(Rule.UPSAMPLE, 9, 9, torch.float64, torch.device("cpu"))
    assert whole.matrix.shape == (1, 18, 7, 15) and whole.inside == ((3, 12),)
    # A tap is a mean of source cells, and nothing outside the map counts.
    assert torch.allclose(whole.matrix.sum(-1), torch.ones(1, 18, 7, dtype=torch.float64))
    assert not whole.matrix[..., :3].any() and not whole.matrix[..., 12:].any()


def test_any_memory_layout() -> None:
    source, kernel = make(2, 5, 4, 3), make(2, 10, 8, 7, 7, seed=1)
    expected = upsample_conv(source, kernel)
    strided = source.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    taps_first = kernel.permute(3, 4, 0, 1, 2).contiguous().permute(2, 3, 4, 0, 1)
    every_other = make(2, 5, 8, 3)
    every_other[:, :, ::2] = source
    for given in (strided, every_other[:, :, ::2]):
        assert torch.equal(upsample_conv(given, taps_first), expected)
    left, right = leaves(strided, taps_first)
    grad = make(2, 10, 8, 3, seed=3)
    upsample_conv(left, right).backward(grad.transpose(1, 2).contiguous().transpose(1, 2))
    plain = leaves(source, kernel)
    upsample_conv(*plain).backward(grad)
    assert left.grad is not None and torch.equal(left.grad, plain[0].grad)
    assert right.grad is not None and torch.equal(right.grad, plain[1].grad)


def test_only_what_learns_has_a_gradient() -> None:
    source, kernel = make(1, 3, 4, 2), make(1, 6, 8, 7, 7, seed=1)
    both = leaves(source, kernel)
    upsample_conv(*both).square().sum().backward()
    for index in range(2):
        given = [source, kernel]
        given[index] = given[index].clone().requires_grad_()
        upsample_conv(*given).square().sum().backward()
        torch.testing.assert_close(given[index].grad, both[index].grad)
        assert given[1 - index].grad is None


def test_half_precision() -> None:
    """Sums in float32: only inputs and result are rounded."""
    source, kernel = make(1, 6, 5, 8).bfloat16(), make(1, 12, 10, 7, 7, seed=1).float() / 7
    given, weights = leaves(source, kernel)
    output = upsample_conv(given, weights)
    assert output.dtype == torch.bfloat16
    exact = upsample_conv(source.double(), kernel.double())
    assert (output.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    output.float().sum().backward()
    assert given.grad is not None and given.grad.dtype == torch.bfloat16
    assert weights.grad is not None and weights.grad.dtype == torch.float32
    assert window_products(source).dtype == torch.float32


def test_autocast_does_not_reach_inside() -> None:
    source, kernel = make(1, 4, 4, 3).float(), make(1, 8, 8, 7, 7, seed=1).float()
    expected = upsample_conv(source, kernel)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = leaves(source, kernel)
        output = upsample_conv(*given)
        assert torch.equal(output, expected)
        assert torch.equal(window_products(source), window_products(source.clone()))
        output.sum().backward()
    plain = leaves(source, kernel)
    upsample_conv(*plain).sum().backward()
    assert given[0].grad is not None and torch.equal(given[0].grad, plain[0].grad)


def test_memory_is_bounded() -> None:
    """Forward and backward take a few maps, not 49."""
    source, kernel = make(1, 24, 24, 96).float(), make(1, 48, 48, 7, 7, seed=1).float()
    result = 48 * 48 * 96 * 4
    with torch.no_grad(), LiveBytes() as forward:
        upsample_conv(source, kernel)
    assert forward.peak < 2.5 * result
    given = leaves(source, kernel)
    output = upsample_conv(*given)
    grad = torch.ones_like(output)
    with LiveBytes() as backward:
        output.backward(grad)
    assert backward.peak < 3 * result
    with torch.no_grad(), LiveBytes() as slow:
        slow_upsample(source, kernel)
    assert slow.peak > 90 * result


def test_inference_then_training() -> None:
    """The cached plans of a map made in inference mode serve training as well."""
    source, kernel = make(1, 7, 11, 2), make(1, 14, 22, 7, 7, seed=1)
    with torch.inference_mode():
        expected = upsample_conv(source, kernel)
    given = leaves(source, kernel)
    output = upsample_conv(*given)
    output.sum().backward()
    assert torch.equal(output, expected.clone())


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"needs kernels of shape \(1, 8, 6, 7, 7\)"):
        upsample_conv(torch.zeros(1, 4, 3, 2), torch.zeros(1, 4, 3, 7, 7))
    with pytest.raises(ValueError, match="needs kernels of shape"):
        adaptive_conv(torch.zeros(1, 2, 10, 10), torch.zeros(2, 4, 4, 7, 7))
    with pytest.raises(ValueError, match="at least 7 cells"):
        adaptive_conv(torch.zeros(1, 2, 6, 9), torch.zeros(1, 0, 3, 7, 7))


def interpret_triton() -> None:
    """Runs in a process of its own: the GPU kernels, by the interpreter, against ours."""
    from llava_uhd.vision import adaptive_conv_tiles as ours
    from llava_uhd.vision import adaptive_conv_triton as kernels

    cases = (
        (Rule.UPSAMPLE, (2, 9), 20, 2, torch.float32),
        (Rule.UPSAMPLE, (1, 2), 16, 1, torch.bfloat16),
        (Rule.REFLECT, (4, 3), 7, 1, torch.float32),
        (Rule.PADDED, (7, 8), 130, 1, torch.float32),
    )
    for rule, size, channels, batch, dtype in cases:
        shape = kernels.Shape.of(rule, size, channels, batch)
        source = make(batch, *size, channels).to(dtype)
        kernel = make(batch, *shape.output, 7, 7, seed=1).float()
        grad = make(batch, *shape.output, channels, seed=2).to(dtype)
        found = (
            kernels.convolve(source, kernel, rule),
            kernels.convolve_transposed(grad, kernel, rule, size),
            kernels.correlate(grad, source, rule),
        )
        wanted = (
            ours.convolve(source.double(), kernel.double(), rule),
            ours.convolve_transposed(grad.double(), kernel.double(), rule, size),
            ours.correlate(grad.double(), source.double(), rule),
        )
        for one, other in zip(found, wanted):
            # The interpreter cuts bfloat16 off where a GPU rounds it.
            bound = 1e-5 if one.dtype == torch.float32 else 2**-7
            worst = (one.double() - other).abs().max() / other.abs().max()
            assert one.shape == other.shape and worst < bound, (rule, size, float(worst))


@pytest.mark.skipif(not HAS_TRITON, reason="the GPU kernels need the triton package")
def test_gpu_kernels_in_the_interpreter(root: Path) -> None:
    """Triton decides on import whether it interprets, hence another process."""
    tests = root / "tests"
    code = "import test_adaptive_conv; test_adaptive_conv.interpret_triton()"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{root}:{tests}"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.skipif(not HAS_TRITON, reason="the GPU kernels need the triton package")
@pytest.mark.parametrize("name", ["_convolve_kernel", "_transposed_kernel", "_correlate_kernel"])
def test_gpu_kernels_compile(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For an H100, without one: the interpreter accepts what the compiler does not."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llava_uhd.vision import adaptive_conv_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as its default is; only quieter
    shape = kernels.Shape.of(Rule.UPSAMPLE, (48, 48), 1024, 1)
    if name == "_transposed_kernel":
        fixed = kernels.constants(shape, torch.bfloat16, kernels.CELLS_TRANSPOSED)
        fixed.update(kernels.transposed_constants(shape))
    else:
        fixed = kernels.constants(shape, torch.bfloat16, kernels.CELLS)
        fixed.update(kernels.window_constants(shape))
    maps, weights = ("source", "left", "grad", "output"), ("weights",)
    signature = {}
    function = getattr(kernels, name)
    for argument in function.arg_names:
        kind = "*bf16" if argument in maps else "*fp32" if argument in weights else "i32"
        signature[argument] = "constexpr" if argument in fixed else kind
    constants = {(function.arg_names.index(key),): value for key, value in fixed.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    assert compile_kernel(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
