"""The fast form of the Hiwin projector against the plain one: outputs and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fixtures_hiwin import MIXED, Grid, HiwinInputs, make_hiwin, views
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from llava_uhd.projectors import hiwin_fast, pooling
from llava_uhd.projectors.hiwin import HiwinProjector
from llava_uhd.projectors.hiwin_fast import gram_pays
from llava_uhd.projectors.pooling import pool_table, pool_windows
from llava_uhd.vision.position import resample_positions


def both_forms(module: HiwinProjector, inputs: HiwinInputs) -> Iterator[dict[str, torch.Tensor]]:
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


def assert_forms_agree(module: HiwinProjector, inputs: HiwinInputs) -> None:
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
    monkeypatch.setattr(hiwin_fast, "CPU_MIXED", 1)
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


@pytest.mark.parametrize("scales", [(1,), (1, 4)])
def test_outlier_channels(monkeypatch: pytest.MonkeyPatch, scales: tuple[int, ...]) -> None:
    """As in real towers, one channel is far larger than the others and nearly constant."""
    monkeypatch.setattr(hiwin_fast, "gram_pays", lambda *sizes: True)
    module = make_hiwin(32, 128, scales=scales)
    features, grids, pixels = views(MIXED, 32)
    features[:, 5] = 40 + features[:, 5]
    assert_forms_agree(module, (features, grids, pixels))
