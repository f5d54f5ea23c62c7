"""The spatially constrained resampler: goldens, an independent RoIAlign, gradients, packing."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.projectors import build_projector
from llava_uhd.projectors import resampler as resampler_module
from llava_uhd.projectors.pooling import pool_windows, pooling_matrices
from llava_uhd.projectors.resampler import SpatialResampler, sincos_table

Grid = tuple[int, int]
POOLS = [(4, 2), (3, 2), (4, 3), (3, 3), (2, 4), (2, 3), (3, 4)]  # columns, rows


def make_config(kv_width: int, width: int, **projector: object) -> LlavaUHDConfig:
    return LlavaUHDConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": kv_width,
            "num_attention_heads": 1,
        },
        text_config={"model_type": "llama", "hidden_size": width, "num_attention_heads": 1},
        projector=dict(projector),
    )


def make_resampler(kv_width: int = 12, width: int = 16, **projector: object) -> SpatialResampler:
    """A small resampler whose parameters are all at random values."""
    options = {"num_heads": 2, **projector}
    module = build_projector(make_config(kv_width, width, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    assert isinstance(module, SpatialResampler)
    return module.eval()


# The plain form, written from the operator's description: loops over windows, bins and samples.


def axis_weights(start: np.float32, end: np.float32, bins: int, length: int) -> np.ndarray:
    """(bins, length) weights of one window along one axis."""
    one = np.float32(1)
    size = max(np.float32(end - start), one)
    step = np.float32(size / np.float32(bins))
    samples = math.ceil(step)
    weights = np.zeros((bins, length))
    for b in range(bins):
        for k in range(samples):
            y = start + np.float32(b) * step
            y = np.float32(y + np.float32(k + 0.5) * step / np.float32(samples))
            if y < -1 or y > length:
                continue  # counted, but zero
            y = max(y, np.float32(0))
            low = int(y)
            if low >= length - 1:
                weights[b, length - 1] += 1 / samples
            else:
                weights[b, low] += (1 - (y - low)) / samples
                weights[b, low + 1] += (y - low) / samples
    return weights


@lru_cache
def window_weights(rows: int, columns: int, side: int) -> torch.Tensor:
    """float64 (windows, bins, rows * columns): every weight of every bin."""
    ratio = math.log(columns / rows)
    errors = [abs(ratio - math.log(c / r)) for c, r in POOLS]
    bin_columns, bin_rows = POOLS[errors.index(min(errors))]
    height = math.sqrt(rows * columns / side**2 / (columns / rows))
    width = height * (columns / rows)
    found = []
    for i in range(side):
        down = axis_weights(np.float32(i * height), np.float32(i * height + height), bin_rows, rows)
        for j in range(side):
            across = axis_weights(
                np.float32(j * width), np.float32(j * width + width), bin_columns, columns
            )
            both = np.einsum("ah,bw->abhw", down, across)
            found.append(both.reshape(bin_rows * bin_columns, rows * columns))
    return torch.from_numpy(np.stack(found))


def plain_resampler(module: SpatialResampler, features: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The published forward of one view, in the dtype of the module."""
    side, dtype = module.grid_size, module.proj.dtype
    value = module.ln_kv(module.kv_proj(features))
    table = module.pos_embed.T.reshape(1, -1, side, side)
    table = torch.nn.functional.interpolate(table, size=grid, mode="bicubic", align_corners=False)
    key = value + table[0].flatten(1).T
    weights = window_weights(*grid, side).to(dtype)
    query = module.ln_q(module.query) + module.pos_embed
    attention = module.attn
    reference = torch.nn.MultiheadAttention(query.shape[1], attention.num_heads).to(dtype)
    out, _ = torch.func.functional_call(
        reference,
        dict(attention.named_parameters()),
        (query[None], (weights @ key).transpose(0, 1), (weights @ value).transpose(0, 1)),
    )
    return module.ln_post(out[0]) @ module.proj


def cells(grids: list[Grid], width: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count = sum(rows * columns for rows, columns in grids)
    return torch.randn(count, width, generator=generator), torch.tensor(grids)


@pytest.mark.parametrize("name", ["resampler_d128", "resampler_d256"])
def test_equals_the_published_module(golden: Path, name: str) -> None:
    tensors = load_file(golden / f"uhd_v1/{name}.safetensors")
    facts = json.loads((golden / f"uhd_v1/{name}.json").read_text())
    module = build_projector(make_config(facts["kv_dim"], facts["embed_dim"]))
    prefix = "weights."
    weights = {k[len(prefix) :]: v.float() for k, v in tensors.items() if k.startswith(prefix)}
    module.load_state_dict(weights)
    base = tensors["input_base"][0]
    grids = [tuple(case["tgt_size"]) for case in facts["cases"]]
    assert len(grids) >= 2
    for rows, columns in grids:
        out = module(base[: rows * columns], torch.tensor([[rows, columns]]))
        expected = tensors[f"output.{rows}x{columns}"][0]
        assert (out - expected).abs().max() <= 1e-5, (rows, columns)
    # All of them, and the reversed one where there is one, in one call.
    inputs = [base[: rows * columns] for rows, columns in grids]
    outputs = [tensors[f"output.{rows}x{columns}"][0] for rows, columns in grids]
    if "output_flipped" in tensors:
        inputs.append(inputs[0].flip(0))
        outputs.append(tensors["output_flipped"][0])
        grids.append(grids[0])
    packed = module(torch.cat(inputs), torch.tensor(grids))
    assert (packed - torch.cat(outputs)).abs().max() <= 1e-5


SHAPES = [(24, 24), (1, 1), (1, 60), (60, 1), (107, 5), (5, 107), (53, 12), (6, 40), (19, 29)]


@pytest.mark.parametrize("grid", SHAPES)
@pytest.mark.parametrize("side", [12, 4])
def test_pooling_equals_plain_roi_align(grid: Grid, side: int) -> None:
    maps = torch.randn(2, *grid, 3, generator=torch.Generator().manual_seed(0))
    pooled = pool_windows(maps, side)  # (windows, n, bins, C)
    expected = window_weights(*grid, side) @ maps.double().flatten(1, 2)[:, None]
    assert pooled.shape == expected.transpose(0, 1).shape
    assert (pooled - expected.transpose(0, 1)).abs().max() < 5e-6


@settings(max_examples=60)
@example(40, 3, 12)
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([3, 8, 12, 16]))
def test_pooling_of_any_shape(rows: int, columns: int, side: int) -> None:
    down, across = pooling_matrices(rows, columns, side)
    found = torch.einsum("ah,bw->abhw", down, across).double()
    bins = (down.shape[0] // side, across.shape[0] // side)
    found = found.reshape(side, bins[0], side, bins[1], rows * columns).transpose(1, 2)
    expected = window_weights(rows, columns, side).reshape(found.shape)
    assert (found - expected).abs().max() < 5e-6
    if min(rows, columns) >= side:
        # Inside the map the weights of every bin sum to one.
        torch.testing.assert_close(down.sum(1), torch.ones(down.shape[0]))


@pytest.mark.parametrize("grid", SHAPES)
def test_equals_the_plain_form(grid: Grid) -> None:
    module = make_resampler()
    features, grids = cells([grid])
    found = module(features, grids)
    expected = plain_resampler(module.double(), features.double(), grid)
    assert found.shape == (144, 16)
    # Some windows of a map smaller than the window grid see only zeros.
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("grids", [[(5, 7)], [(3, 3), (5, 2), (3, 3)], [(1, 9), (13, 13)]])
@pytest.mark.parametrize("kv_width", [12, 16])
def test_gradients_equal_those_of_the_plain_form(grids: list[Grid], kv_width: int) -> None:
    module = make_resampler(kv_width, num_queries=16).double()
    features, view_grids = cells(grids, kv_width)
    found, expected = [], []
    for forms, packed in ((found, True), (expected, False)):
        module.zero_grad()
        given_features = features.double().requires_grad_()
        parts = given_features.split([rows * columns for rows, columns in grids])
        if packed:
            out = module(given_features, view_grids)
        else:
            out = torch.cat([plain_resampler(module, *each) for each in zip(parts, grids)])
        torch.sin(out).sum().backward()
        forms.append(("features", given_features.grad))
        forms += [(name, p.grad.clone()) for name, p in module.named_parameters()]
    assert len(found) == len(expected) > 10
    for (name, gradient), (_, reference) in zip(found, expected):
        # Positions are resampled in float32, whatever the module's dtype.
        largest = reference.abs().max()
        assert largest > 0
        assert (gradient - reference).abs().max() < 1e-5 * largest, name


def test_gradients_of_the_key_bias_vanish() -> None:
    """It adds the same to all scores of a window; the softmax does not see it."""
    module = make_resampler()
    features, grids = cells([(6, 5)])
    module(features, grids).sum().backward()
    gradient = module.attn.in_proj_bias.grad
    assert gradient is not None and gradient.shape == (48,)
    assert not gradient[16:32].any() and gradient[:16].any() and gradient[32:].any()


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6))
def test_packed_equals_one_by_one(grids: list[Grid]) -> None:
    module = make_resampler(num_queries=16)
    features, view_grids = cells(grids)
    with torch.no_grad():
        packed = module(features, view_grids)
        parts = features.split([rows * columns for rows, columns in grids])
        alone = [module(part, torch.tensor([grid])) for part, grid in zip(parts, grids)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert packed.shape[0] == 16 * len(grids)


def test_order_of_views_is_kept() -> None:
    module = make_resampler(num_queries=16)
    grids = [(5, 7), (3, 3), (5, 7), (7, 5)]
    features, view_grids = cells(grids)
    tokens = module(features, view_grids).split(16)
    parts = list(features.split([rows * columns for rows, columns in grids]))
    order = [2, 3, 0, 1]
    shuffled = module(torch.cat([parts[i] for i in order]), view_grids[order]).split(16)
    for place, index in enumerate(order):
        torch.testing.assert_close(shuffled[place], tokens[index])
    assert not torch.allclose(tokens[0], tokens[2])


def test_small_temporaries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_resampler()
    features, grids = cells([(5, 7), (5, 7)])
    expected = module(features, grids)
    monkeypatch.setattr(resampler_module, "MIXED_ELEMENTS", 1)
    torch.testing.assert_close(module(features, grids), expected)


def test_positions_follow_their_table() -> None:
    module = make_resampler()
    features, grids = cells([(5, 7)])
    with torch.no_grad():
        before = module(features, grids)
        module.pos_embed.add_(torch.randn(144, 16))
        assert not torch.allclose(module(features, grids), before)
    with torch.inference_mode():
        module(features, grids)
    module(features, grids).sum().backward()
    assert module.pos_embed.grad is not None and module.pos_embed.grad.abs().sum() > 0


def test_half_precision_and_rounded_boxes() -> None:
    features, grids = cells([(24, 24), (20, 27)])
    module = make_resampler()
    full = module(features, grids)
    half = module.bfloat16()(features.bfloat16(), grids)
    assert half.dtype == torch.bfloat16
    assert (half - full).abs().mean() < 0.02 * full.abs().max()
    exact, rounded = pooling_matrices(20, 27, 12), pooling_matrices(20, 27, 12, torch.bfloat16)
    assert not torch.equal(exact[0], rounded[0])
    square = pooling_matrices(24, 24, 12), pooling_matrices(24, 24, 12, torch.bfloat16)
    assert torch.equal(square[0][0], square[1][0])  # windows of 2 cells are representable
    # In float32 rounding to the feature dtype leaves every corner where it is.
    torch.testing.assert_close(make_resampler(round_boxes=True)(features, grids), full)


def test_initial_values() -> None:
    table = sincos_table(12, 128)
    assert table.shape == (144, 128) and table.dtype == torch.float32
    picked = table[1, [0, 32, 64, 96]]
    torch.testing.assert_close(picked, torch.tensor([0.841471, 0.540302, 0.0, 1.0]))
    picked = table[12, [0, 32, 64, 96]]
    torch.testing.assert_close(picked, torch.tensor([0.0, 1.0, 0.841471, 0.540302]))


def test_refuses_impossible_shapes() -> None:
    with pytest.raises(UserError, match="square number"):
        build_projector(make_config(8, 16, num_queries=150))
    with pytest.raises(ValueError, match="heads"):
        build_projector(make_config(8, 18))
    with pytest.raises(UserError, match="spatial_resampler"):
        build_projector(make_config(8, 16, type="spatial_resample"))


def test_training_after_inference() -> None:
    maps = torch.rand(1, 13, 17, 8)  # a shape that no other test fills the caches with
    with torch.inference_mode():
        pool_windows(maps, 5)
    maps.requires_grad_()
    pool_windows(maps, 5).sum().backward()
    assert maps.grad is not None
