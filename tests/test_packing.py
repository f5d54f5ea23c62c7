"""Plans of packed rows: nothing lost, nothing above the budget, like costs, the same again."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from llava_uhd.data.filling import POOL, TooLongError, pack_rows
from llava_uhd.data.packed import PackedSampler
from llava_uhd.data.packing import (
    Packing,
    arrange,
    mean_budget,
    report,
    rows_for,
    shuffle,
)


def llava_lengths(count: int, seed: int = 0) -> np.ndarray:
    """An assumption on LLaVA-665K: 576 tokens of an image in 94 %, log-normal texts."""
    rng = np.random.default_rng(seed)
    text = np.exp(rng.normal(np.log(250) - 0.5, 1.0, count)).astype(np.int64) + 1
    return np.minimum(np.minimum(text, 2048) + 576 * (rng.random(count) < 0.94), 2048)


def fixed(tokens: np.ndarray, costs: np.ndarray | None = None) -> Any:
    return lambda epoch: (tokens, tokens.astype(float) if costs is None else costs)


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=120)


@given(lengths, st.integers(60, 200), st.integers(0, 99))
def test_rows_hold_every_sample_once_within_the_budget(
    sizes: list[int], budget: int, seed: int
) -> None:
    tokens = np.array(sizes)
    order = shuffle(len(sizes), random.Random(seed)).tolist()
    rows = pack_rows(tokens, budget, order)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    assert all(0 < tokens[row].sum() <= budget for row in rows)
    # No row could have taken all of another one.
    sums = sorted(tokens[row].sum() for row in rows)
    if len(sums) > 1 and len(sizes) <= POOL:
        assert sums[0] + sums[1] > budget
    assert rows == pack_rows(tokens, budget, order)


def test_the_first_waiting_sample_begins_a_row() -> None:
    assert pack_rows(np.array([6, 3, 4, 7]), 10, range(4)) == [[0, 2], [1, 3]]
    assert pack_rows(np.array([], np.int64), 10, []) == []
    with pytest.raises(TooLongError, match="sample 1 of 11 tokens does not fit into a row of 10"):
        pack_rows(np.array([6, 11]), 10, range(2))


@pytest.mark.parametrize(("budget", "bound"), [(2048, 0.97), (4096, 0.995), (12544, 0.995)])
def test_lengths_like_llava_665k_fill_the_rows(budget: int, bound: float) -> None:
    tokens = llava_lengths(20_000)
    packing = Packing(fixed(tokens), budget, 8, seed=3)
    found = packing.report()
    assert found.samples == 20_000 and found.fill > bound
    assert found.fill == pytest.approx(tokens.sum() / (found.rows * budget))
    assert 1 <= found.imbalance < 1.01


def test_half_a_million_samples_take_seconds() -> None:
    tokens = llava_lengths(500_000)
    begun = time.process_time()
    plan = Packing(fixed(tokens), 4096, 16, seed=3).plan(0)
    assert time.process_time() - begun < 20  # 2 on an idle core
    assert np.array_equal(np.sort(plan.order), np.arange(500_000))


@given(lengths, st.integers(1, 7), st.integers(0, 3), st.integers(0, 99))
def test_every_step_has_as_many_rows(sizes: list[int], group: int, more: int, seed: int) -> None:
    tokens = np.array(sizes)
    rows = pack_rows(tokens, 100, range(len(sizes)))
    steps = -(-len(rows) // group) + more
    plan = arrange(rows, tokens.astype(float), group, steps, random.Random(seed))
    assert plan.steps == steps and len(plan) == steps * group
    assert sorted(plan.order.tolist()) == list(range(len(sizes)))
    assert [index for row in plan.rows() for index in row] == plan.order.tolist()
    assert plan.sums(tokens).max() <= 100
    # Samples are never without a row while a row of several could be shared.
    split = [plan.row(number) for number in range((steps - plan.tail_steps) * group, len(plan))]
    assert not any(len(row) > 1 for row in split) or all(split)
    assert plan.tail_steps <= more + 1
    found = report(plan, tokens, tokens.astype(float), 100)
    assert found.samples == len(sizes) and found.rows == steps * group
    assert found.most_samples >= found.samples_per_step >= len(sizes) / steps - 1e-9


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="3 rows do not fit into 1 steps of 2"):
        arrange([[0], [1], [2]], np.ones(3), 2, 1, random.Random(0))


def test_rows_of_a_step_cost_alike() -> None:
    """Costs that have nothing to do with the tokens."""
    tokens = llava_lengths(8_000)
    costs = np.random.default_rng(1).lognormal(size=len(tokens))
    packing = Packing(fixed(tokens, costs), 4096, 8, seed=3)
    plan, found = packing.plan(0), packing.report()
    assert found.imbalance == pytest.approx(
        float((plan.sums(costs).max(1) / plan.sums(costs).mean(1)).mean())
    )
    shuffled = np.random.default_rng(2).permutation(plan.sums(costs).ravel()).reshape(-1, 8)
    at_random = float((shuffled.max(1) / shuffled.mean(1)).mean())
    assert found.imbalance - 1 < 0.15 * (at_random - 1)


def test_an_order_of_seed_and_epoch_alone() -> None:
    tokens = llava_lengths(600)

    def orders(seed: int, epochs: int = 2) -> list[list[int]]:
        packing = Packing(fixed(tokens), 4096, 4, seed, epochs)
        return [packing.plan(epoch).order.tolist() for epoch in range(epochs)]

    first = orders(1)
    assert first == orders(1) and first[0] != first[1]
    assert orders(2)[0] not in first
    # A resumed run asks for a later epoch at once.
    packing = Packing(fixed(tokens), 4096, 4, 1, 2)
    assert packing.plan(1).order.tolist() == first[1]
    assert packing.plan(0).order.tolist() == first[0]


def test_every_epoch_has_the_steps_of_the_longest() -> None:
    """Also where the token counts change from epoch to epoch."""

    def counts(epoch: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = llava_lengths(400, seed=epoch) // (2 if epoch != 2 else 1)
        return tokens, tokens.astype(float)

    packing = Packing(counts, 2048, 3, seed=5, epochs=3.5)
    needed = [Packing(counts, 2048, 3, seed=5).steps]
    assert packing.steps > needed[0]
    for epoch in range(4):
        plan = packing.plan(epoch)
        assert plan.steps == packing.steps
        assert sorted(plan.order.tolist()) == list(range(400))
        assert plan.sums(counts(epoch)[0]).max() <= 2048
    # As many epochs as the steps last.
    assert Packing(counts, 2048, 3, seed=5, max_steps=needed[0]).steps == needed[0]
    assert Packing(counts, 2048, 3, seed=5, max_steps=4 * packing.steps).steps == packing.steps


def test_what_the_plans_follow_from() -> None:
    tokens = llava_lengths(50)
    base = Packing(fixed(tokens), 4096, 2, seed=1).digest()
    assert base == Packing(fixed(tokens), 4096, 2, seed=1).digest()
    other = tokens.copy()
    other[7] += 1
    changed = [
        Packing(fixed(other), 4096, 2, seed=1),
        Packing(fixed(tokens, tokens * 2.0), 4096, 2, seed=1),
        Packing(fixed(tokens), 4095, 2, seed=1),
        Packing(fixed(tokens), 4096, 1, seed=1),
        Packing(fixed(tokens), 4096, 2, seed=2),
    ]
    assert len({base, *(each.digest() for each in changed)}) == 6


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_devices_share_the_rows_of_a_step(devices: int) -> None:
    """As the data loaders of several processes do: no row twice, none missing, like counts."""
    tokens = llava_lengths(300)
    packing = Packing(fixed(tokens), 4096, 4, seed=1)
    epochs: list[int] = []
    sampler = PackedSampler(packing, epochs.append)
    sampler.set_epoch(0)
    assert epochs == [0] and len(sampler) == packing.num_rows == len(list(sampler))
    shares = [
        [row for (row,) in BatchSamplerShard(BatchSampler(sampler, 1, False), devices, rank)]
        for rank in range(devices)
    ]
    assert {len(share) for share in shares} == {packing.num_rows // devices}
    rows = [tuple(row) for row in packing.plan(0).rows()]
    together = [row for rows in zip(*shares, strict=True) for row in rows]
    assert together == rows


def test_small_numbers() -> None:
    assert rows_for(128, 5.2, 8) == 24
    assert rows_for(128, 300.0, 8) == 8
    assert mean_budget(np.array([3, 4, 4]), 2) == 8
    assert mean_budget(np.array([3, 4, 90]), 2) == 90
