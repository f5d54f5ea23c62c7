"""``bench pack``: figures by hand, the same samples in every way, the command, its verdict."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava_uhd.bench import pack
from llava_uhd.bench.__main__ import COMMANDS, main
from llava_uhd.bench.pack_data import (
    LONGEST,
    SAMPLES,
    TEXT_ONLY,
    Lengths,
    maker_of,
    of_recipe,
    simulated,
    text_lengths,
)
from llava_uhd.bench.pack_passes import MASKED, MODELS, SCALE, Task, learned, make_batches, prepare
from llava_uhd.bench.pack_plans import (
    GROUPED,
    PACKED,
    SHUFFLED,
    Sharing,
    compare_plans,
    grouped_order,
    packed_way,
    padded_way,
)
from llava_uhd.bench.timing import compare
from llava_uhd.data.costs import TrainingCost
from llava_uhd.errors import UserError
from llava_uhd.images.cost import language_shape, tower_flops

SMALL = Task(layers=1, hidden=64)
WORDS = ("--samples", "3000", "--passes", "12", "--layers", "1", "--hidden", "64")
WORDS = (*WORDS, "--repeats", "1", "--per-device", "4")


def bench(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", "pack", *words])
    return main()


def test_the_assumed_lengths() -> None:
    text, pictured = text_lengths(100_000, 1)
    assert text.min() >= 1 and text.max() == LONGEST
    assert 240 < text.mean() < 253
    assert np.log(text).std() == pytest.approx(1.0, abs=0.02)
    assert 1 - pictured.mean() == pytest.approx(TEXT_ONLY, abs=0.003)
    lengths = simulated(2_000)
    assert lengths.tokens.max() <= LONGEST and len(lengths.words) == 2_000
    assert ((np.array(lengths.words) > 0) == (lengths.vision > 0)).all()
    assert SAMPLES == 665_298


def test_costs_are_those_of_the_7b_model() -> None:
    from llava_uhd.checkpoint.shapes import known_model

    config = known_model("vicuna-7b-v1.5", None)
    lengths = simulated(50)
    tower = tower_flops(config, [(24, 24)])
    projector = 2 * 576 * (1024 * 4096 + 4096 * 4096)
    assert lengths.vision.max() == tower + 3 * projector
    linear = 2 * language_shape(config.text_config).body_weights
    assert lengths.language(np.array([100]))[0] == pytest.approx(
        3 * (linear * 100 + 2 * 32 * 4096 * 100**2)
    )


LINEAR = TrainingCost(linear=1.0, square=0.0, language=1)


def given(tokens: list[int]) -> Lengths:
    return Lengths("given", np.array(tokens), np.zeros(len(tokens)), tokens, LINEAR)


def test_padded_batches_by_hand() -> None:
    lengths = given([1, 3, 2, 2, 4, 1, 5])
    way = padded_way("x", range(7), lengths, Sharing(2, 2, 1), 0.0)
    # Batches of 2 x 3, 2 x 2, 2 x 4 and 1 x 5 slots; steps of two.
    assert (way.batches, way.slots, way.row) == (4, 23, 8)
    assert way.fill == pytest.approx(18 / 23) and way.operations == 23
    assert way.imbalance == pytest.approx((6 / 5 + 8 / 6.5) / 2)
    assert way.samples_per_step == pytest.approx(7 / 2)
    # Without a whole step there is nothing to wait for.
    assert padded_way("x", range(3), lengths, Sharing(2, 4, 1), 0.0).imbalance == 1.0


def test_all_ways_hold_the_same_samples() -> None:
    lengths, sharing = simulated(1_500), Sharing(4, 4, 2)
    assert sorted(grouped_order(lengths, sharing, 0)) == list(range(1_500))
    ways = compare_plans(lengths, sharing, [None, 4096])
    assert [way.name.split()[0] for way in ways] == [SHUFFLED, GROUPED, PACKED, PACKED]
    total = int(lengths.tokens.sum())
    for way in ways:
        assert way.fill == pytest.approx(total / way.slots)
    assert ways[2].fill > 0.9 > ways[0].fill
    assert ways[3].row == 4096 and ways[3].batches % 8 == 0
    assert ways[2].imbalance < ways[0].imbalance
    assert ways[2].operations == ways[3].operations < ways[0].operations
    way, packing = packed_way(lengths, sharing, 0)
    assert way.row == packing.budget == pytest.approx(4 * lengths.tokens.mean(), abs=1)


def test_lengths_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lengths, recipe = of_recipe("debug/pretrain")
    assert recipe.name == "debug/pretrain" and len(lengths.tokens) == 16
    assert (lengths.vision > 0).all() and min(lengths.words) > 0
    assert "16 samples of debug/pretrain" in lengths.title


def test_the_recipe_that_makes_a_checkpoint_stands_in() -> None:
    section = maker_of("checkpoints/quickstart-pretrain")
    assert isinstance(section.language_model, dict)
    with pytest.raises(UserError, match="checkpoint nowhere is not here, and no recipe makes it"):
        maker_of("nowhere")


@pytest.mark.parametrize("kind", MODELS)
def test_every_way_learns_the_same(kind: str, tmp_path: Path) -> None:
    passes = prepare(kind, SMALL, 12, Sharing(4, 8, 1), tmp_path)
    assert set(passes.variants) == {SHUFFLED, GROUPED, PACKED, MASKED} == set(passes.batches)
    assert passes.batches[SHUFFLED] == 3 and len(passes.lengths.tokens) == 12
    comparison = compare("x", passes.variants, repeats=1)
    assert 0 < comparison.worst_error < pack.GRADIENTS
    gradients = passes.variants[PACKED].common(passes.variants[PACKED].run())
    assert float(gradients.abs().max()) > 1e-4


def test_simulated_samples_are_scaled(tmp_path: Path) -> None:
    passes = prepare("simulated", SMALL, 40, Sharing(4, 1, 1), tmp_path)
    text, pictured = text_lengths(40, 0)
    tokens = passes.lengths.tokens
    assert SCALE == 9 and tokens.max() <= LONGEST // SCALE
    found = tokens - 64 * pictured
    expected = np.minimum(np.maximum(np.round(text / SCALE), 3), LONGEST // SCALE - 64 * pictured)
    assert (found == expected).all()


def test_learned_tokens_are_counted_alike() -> None:
    rows = torch.arange(1, 5)
    sample = {"input_ids": rows, "labels": torch.tensor([-100, -100, 3, 4])}
    batches = make_batches([sample] * 6, given([4] * 6), Sharing(2, 1, 1))
    assert {name: learned(each) for name, each in batches.items()} == {
        SHUFFLED: 12, GROUPED: 12, PACKED: 12,
    }  # fmt: skip


def test_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert pack in COMMANDS
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "figures.json"
    assert bench(monkeypatch, *WORDS, "--json", str(file)) == 0
    printed = capsys.readouterr().out
    assert "3,000 simulated samples (assumed: 6% without image" in printed
    assert "packed, one mask" in printed and "samples of the embedded mixture" in printed
    figures = json.loads(file.read_text())
    assert figures["passed"] and len(figures["plans"]) == 1
    for passes in figures["passes"]:
        assert passes["samples"] == 12 and passes["learned"] > 12
        for row in passes["rows"]:
            rate = passes["rates"][row["name"]]
            assert rate["samples_per_second"] == pytest.approx(12 / row["best_s"])
            assert rate["learned_tokens_per_second"] == pytest.approx(
                passes["learned"] / row["best_s"]
            )


def test_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    # Sixteen samples in rows of two.
    words = (*WORDS, "--plan-only", "--recipe", "debug/pretrain", "--devices", "2")
    assert bench(monkeypatch, *words) == 1
    printed = capsys.readouterr().out
    assert "FAILED: 16 samples of debug/pretrain: only" in " ".join(printed.split())
    monkeypatch.setattr(pack, "FILL", 0.1)
    assert bench(monkeypatch, *words) == 0
    monkeypatch.setattr(pack, "GRADIENTS", 0.0)
    assert bench(monkeypatch, *WORDS) == 1
    assert "gradients differ by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--per-device", "0"), "--per-device must be at least 1, got 0"),
        (("--hidden", "100"), "--hidden must be a multiple of 64, got 100"),
        (("--budgets", "4096,x"), "--budgets 4096,x must be numbers of tokens, at least 2048"),
        (("--budgets", "100"), "at least 2048"),
        (("--device", "cuda"), "this machine has no CUDA device"),
    ],
)
def test_refusals(monkeypatch: pytest.MonkeyPatch, words: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        bench(monkeypatch, *words)
