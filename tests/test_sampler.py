from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_uhd.data.sampler import (
    ModalityLengthSampler,
    SeededSampler,
    length_grouped_indices,
    modality_length_grouped_indices,
    split_to_even_chunks,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_published_orders(golden: Path) -> None:
    cases = json.loads((golden / "llava_1_5/length_grouped_sampler.json").read_text())
    functions = {
        "modality": modality_length_grouped_indices,
        "plain": length_grouped_indices,
    }
    for case in cases["cases"]:
        function = functions[case["function"]]
        got = function(
            case["lengths"],
            case["batch_size"],
            case["world_size"],
            seeded(case["torch_manual_seed"]),
        )
        assert got == case["indices"], case
    assert len(cases["cases"]) == 20
    for case in cases["split_to_even_chunks"]:
        chunks = split_to_even_chunks(case["indices"], case["lengths"], case["num_chunks"])
        assert chunks == case["chunks"], case
    assert cases["split_to_even_chunks"]


lengths = st.lists(st.integers(-500, 500).filter(bool), min_size=1, max_size=80)


@given(lengths, st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_every_sample_once_and_modalities_apart(
    sizes: list[int], batch: int, world: int, seed: int
) -> None:
    order = modality_length_grouped_indices(sizes, batch, world, seeded(seed))
    assert sorted(order) == list(range(len(sizes)))
    images = sum(size > 0 for size in sizes)
    texts = len(sizes) - images
    if images and texts:
        mega = batch * world
        whole = (images - 1) // mega + (texts - 1) // mega
        for start in range(0, whole * mega, mega):
            assert len({sizes[index] > 0 for index in order[start : start + mega]}) == 1
        assert order[whole * mega :] == sorted(order[whole * mega :])


def test_lengths_are_alike_inside_a_mega_batch() -> None:
    sizes = list(range(1, 65))
    order = length_grouped_indices(sizes, 4, 4, seeded(0))
    for start in range(0, 64, 16):
        totals = [sum(sizes[i] for i in order[start + 4 * c : start + 4 * c + 4]) for c in range(4)]
        assert max(totals) - min(totals) < 40


def test_zero_length_is_refused() -> None:
    with pytest.raises(ValueError, match="length of 0"):
        modality_length_grouped_indices([1, 0, -1], 1, 1, seeded(0))


def test_orders_depend_on_seed_and_epoch_alone() -> None:
    sizes = [(-1) ** i * (i + 1) for i in range(40)]
    samplers = [
        ModalityLengthSampler(sizes, 2, 2, seed=3),
        SeededSampler(40, seed=3),
    ]
    for sampler in samplers:
        orders = []
        for epoch in (0, 1, 2):
            sampler.set_epoch(epoch)
            orders.append(list(sampler))
            torch.rand(5)  # the global generator plays no part
            assert list(sampler) == orders[-1] and len(sampler) == 40
        assert len({tuple(order) for order in orders}) == 3
        assert all(sorted(order) == list(range(40)) for order in orders)
    other = SeededSampler(40, seed=4)
    seen = {tuple(SeededSampler(40, seed=3)), tuple(other)}
    other.set_epoch(1)
    assert len(seen | {tuple(other)}) == 3


def test_epoch_reaches_the_data_set() -> None:
    told: list[int] = []
    SeededSampler(3, on_epoch=told.append).set_epoch(5)
    ModalityLengthSampler([1, 2], 1, 1, on_epoch=told.append).set_epoch(6)
    assert told == [5, 6]
