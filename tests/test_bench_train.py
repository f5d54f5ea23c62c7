"""bench train: drawn samples, models of real shapes, figures by hand, the command."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_uhd.bench import train as command
from llava_uhd.bench import train_estimate
from llava_uhd.bench.__main__ import main
from llava_uhd.bench.train_data import (
    CAPTIONS,
    INSTRUCTIONS,
    SIZES,
    Drawn,
    Mix,
    draw,
    facts_of_sample,
    write_data,
)
from llava_uhd.bench.train_estimate import (
    DEFAULT_RECIPES,
    Estimate,
    estimate,
    mix_of,
    samples_of,
    stage_weights,
)
from llava_uhd.bench.train_run import Cuts, TrainTask, cut_language, figures, measure, random_model
from llava_uhd.checkpoint.shapes import describe_recipe
from llava_uhd.config.compression import Stage
from llava_uhd.config.recipe import list_recipes, load_recipe
from llava_uhd.data.collator import Collator
from llava_uhd.data.dataset import ConversationDataset, open_records
from llava_uhd.errors import UserError
from llava_uhd.train.counting import facts_of
from llava_uhd.train.flops import PartFlops
from llava_uhd.train.timing import PARTS

SHORT = Mix(40, 0.5, 60, 0.25, 0.5)

# --- drawn samples --------------------------------------------------------------------------------


def test_lengths_are_those_of_the_mix() -> None:
    drawn = draw(INSTRUCTIONS, 20_000)
    texts = [sample.text for sample in drawn]
    # The cut at 2048 takes a little off the mean of 250; the median of a log-normal is exp(mu).
    assert statistics.fmean(texts) == pytest.approx(247, rel=0.03)
    assert statistics.median(texts) == pytest.approx(250 * 2.71828**-0.5, rel=0.03)
    assert max(texts) == 2048
    alone = sum(sample.size is None for sample in drawn) / len(drawn)
    assert alone == pytest.approx(0.06, abs=0.01)
    assert draw(INSTRUCTIONS, 50) == draw(INSTRUCTIONS, 50) != draw(INSTRUCTIONS, 50, seed=1)
    assert sum(weight for _, weight in SIZES) == pytest.approx(1)


def test_arithmetic_equals_the_data_itself(tmp_path: Path) -> None:
    """The same sample, by formulas and through files, processor and collator."""
    recipe = load_recipe("uhd_v1/finetune_vicuna7b", debug=True)
    parts = random_model(recipe, torch.float32, torch.device("cpu"))
    samples = [Drawn(80, (640, 480)), Drawn(90, None), Drawn(100, (350, 500))]
    mix = dataclasses.replace(SHORT, answers=0.4)
    file = write_data(tmp_path, samples, mix, parts.processor)
    data = dataclasses.replace(
        recipe.data, embedded=None, path=str(file), image_folder=str(tmp_path),
        six_slice_probability=0.0, textvqa_long_side=None,
    )  # fmt: skip
    dataset = ConversationDataset(open_records(data), parts.processor, data, 0)
    for index, sample in enumerate(samples):
        batch = Collator(0, packed=True)([dataset[index]])
        seen = facts_of(batch, parts.model.config, compresses=True)
        counted = facts_of_sample(parts.model.config, sample, mix)
        assert seen.grids == counted.grids and seen.visual == counted.visual
        assert seen.runs[0] == (counted.runs[0] if counted.runs else ())
        # A newline behind the image, the end of the answer: a few tokens beside the drawn ones.
        assert seen.tokens == pytest.approx(counted.tokens, abs=4)
        text = seen.tokens - (counted.tokens - sample.text)
        assert text == pytest.approx(sample.text, abs=4)


def test_long_samples_are_cut() -> None:
    config = describe_recipe(load_recipe("llava_1_5/finetune_vicuna7b"))
    facts = facts_of_sample(config, Drawn(2000, (640, 480)), INSTRUCTIONS, max_length=2048)
    assert facts.lengths == (2048,) and facts.visual == 576
    assert facts.learned == 1000 - (2000 + 576 - 2048)


# --- models ---------------------------------------------------------------------------------------


def test_real_shape_cut() -> None:
    recipe = load_recipe("uhd_v1/finetune_vicuna7b")
    cuts = Cuts(layers=1, hidden=256, tower_layers=3)
    model = random_model(recipe, torch.bfloat16, torch.device("cpu"), cuts).model
    text = model.config.text_config
    assert (text.num_hidden_layers, text.hidden_size, text.num_attention_heads) == (1, 256, 2)
    # 11008 * 256 / 4096 is 688; widths of the MLP are multiples of 32.
    assert text.intermediate_size == 704 and text.vocab_size == 32000
    assert model.config.vision_config.hidden_size == 1024
    assert model.config.projector.num_queries == 144
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def test_real_shape_whole() -> None:
    """Every weight of the published model, without memory for them."""
    recipe = load_recipe("llava_1_5/finetune_vicuna7b")
    model = random_model(recipe, torch.bfloat16, torch.device("meta")).model
    sizes = {
        part: sum(p.numel() for p in getattr(model, part).parameters())
        for part in ("language_model", "projector")
    }
    assert sizes == {"language_model": 6_738_415_616, "projector": 20_979_712}


def test_grouped_queries_are_cut_together() -> None:
    values = describe_recipe(load_recipe("onevision/stage1_qwen2_0_5b")).text_config.to_dict()
    cut = cut_language(values, Cuts(hidden=448))
    assert (cut["num_attention_heads"], cut["num_key_value_heads"]) == (7, 1)
    with pytest.raises(UserError, match="multiple of 448"):
        cut_language(values, Cuts(hidden=64))


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_has_a_bench_model(name: str) -> None:
    recipe = load_recipe(name, debug=True)
    model = random_model(recipe, torch.float32, torch.device("meta")).model
    assert set(recipe.stage.learn) & {"projector", "language_model", "vision_tower"}
    assert model.config.text_config.num_hidden_layers == 2


# --- measuring ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["padded", "grouped", "packed"])
def test_some_steps(batching: str) -> None:
    words = ("--stage.learn.vision_tower", "true")
    recipe = load_recipe("uhd_v1/finetune_vicuna7b", words, debug=True)
    task = TrainTask(recipe, batching, SHORT, steps=2, warmup=1, batch=2, accumulated=2)
    found = measure(task)
    assert found["steps"] == 2 and found["batching"] == batching
    assert found["step_seconds_best"] <= found["step_seconds_median"]
    assert sum(found["parts"].values()) == pytest.approx(1, abs=1e-3)
    assert found["parts"]["backward_vision_tower"] > 0
    assert found["mfu"] > 0 and found["tokens_per_cpu_second"] > 0
    assert found["learning"] == found["parameters"] - 16 * 64, "the positions rest"
    assert (found["padding"] == 0) == (batching == "packed")
    assert (found["fill"] is None) == (batching != "packed")
    assert found["fill"] is None or found["fill"] > 0.5


def test_adapters() -> None:
    recipe = load_recipe("llava_1_5/lora_vicuna7b", debug=True)
    found = measure(TrainTask(recipe, "padded", SHORT, steps=1, warmup=0))
    assert 0 < found["learning"] < found["parameters"] and found["tflops_per_second"] > 0


def entries(*seconds: float) -> list[dict[str, Any]]:
    """Steps of 10 samples and 100 tokens at 2e12 operations each, on a peak of 1e12."""
    return [
        {
            "step_seconds": each,
            "samples_per_second": 10 / each,
            "tokens_per_second": 100 / each,
            "visual_tokens_per_second": 60 / each,
            "learned_tokens_per_second": 20 / each,
            "tflops_per_second": 2 / each,
            "mfu": 2 / each,
            "padding": 0.25,
            "peak_memory_gib": 1.5,
            **{f"time_{part}": each / len(PARTS) for part in PARTS},
        }
        for each in seconds
    ]


def test_figures_by_hand() -> None:
    task = TrainTask(load_recipe("debug/pretrain"), "padded", SHORT, steps=3, warmup=1)
    found = figures(task, entries(100.0, 4.0, 5.0, 11.0))
    assert (found["step_seconds_median"], found["step_seconds_best"]) == (5.0, 4.0)
    # 30 samples, 300 tokens and 6e12 operations in 20 seconds.
    assert found["samples_per_second"] == pytest.approx(1.5)
    assert found["tokens_per_second"] == pytest.approx(15.0)
    assert found["tflops_per_second"] == pytest.approx(0.3)
    assert found["mfu"] == pytest.approx(0.3)
    assert found["data_wait"] == pytest.approx(1 / len(PARTS))
    without = [{k: v for k, v in e.items() if k != "mfu"} for e in entries(1.0, 1.0)]
    assert figures(task, without)["mfu"] is None
    with pytest.raises(UserError, match="no step was measured"):
        figures(task, entries(1.0))


# --- estimates ------------------------------------------------------------------------------------


def test_hours_by_hand() -> None:
    found = Estimate("r", 1_000_000, 700, 576, PartFlops(1e12, 1e12, 8e12))
    assert found.hours(8, 312e12, 0.4) == pytest.approx(1e19 / (8 * 312e12 * 0.4) / 3600)
    assert dataclasses.replace(found, samples=None).hours(8, 312e12, 0.4) is None


def test_estimates_meet_published_times() -> None:
    """LLaVA-1.5-7B on 8 A100: 3.5 h and 10 h are published, at 29-30 % and 21-27 % of the peak."""
    first = estimate(load_recipe("llava_1_5/pretrain_vicuna7b"))
    second = estimate(load_recipe("llava_1_5/finetune_vicuna7b"))
    assert (first.samples, second.samples) == (558_128, 665_298)
    assert first.hours(8, 312e12, 0.295) == pytest.approx(3.5, rel=0.1)
    assert second.hours(8, 312e12, 0.24) == pytest.approx(10, rel=0.1)
    assert first.visual == 576 and second.visual == pytest.approx(0.94 * 576, rel=0.02)


def test_compression_saves_what_its_stages_do() -> None:
    plain = estimate(load_recipe("llava_1_5/finetune_vicuna7b"))
    heavy, stages = (
        load_recipe("llava_1_5/finetune_vicuna7b", ["--compression.schedule", name])
        for name in ("heavy", "four_stage")
    )
    config = describe_recipe(stages)
    weights = stage_weights(stages, config, 665_298)
    assert [stage for stage, _ in weights] == [Stage(2, 8), Stage(2, 2), Stage(16, 2), Stage()]
    assert [weight for _, weight in weights] == pytest.approx([0.25] * 4, abs=1e-3)
    assert sum(weight for _, weight in weights) == pytest.approx(1)
    found = estimate(heavy).flops.language, estimate(stages).flops.language, plain.flops.language
    assert found[0] < found[1] < found[2]
    # The part of visual tokens: 0.18 of their layers with 2/8, 0.615 with four stages.
    tokens, text = plain.visual, plain.tokens - plain.visual
    assert found[1] / found[2] == pytest.approx((0.615 * tokens + text) / (tokens + text), rel=0.03)


@pytest.mark.parametrize("name", ["uhd_v2/finetune_vicuna7b", "onevision/stage2_si_qwen2_7b"])
def test_unknown_numbers_of_samples(name: str) -> None:
    recipe = load_recipe(name)
    assert samples_of(recipe, 1000) == 1000
    known = samples_of(recipe, None)
    assert known == (858_000 if name.startswith("uhd") else None)
    assert mix_of(recipe) is INSTRUCTIONS


def test_first_stages_have_captions() -> None:
    assert mix_of(load_recipe("uhd_v1/pretrain_vicuna7b")) is CAPTIONS


# --- the command ----------------------------------------------------------------------------------


def bench(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", "train", *words])
    return main()


def test_estimate_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(train_estimate, "DRAWN", 50)
    file = tmp_path / "hours.json"
    assert bench(monkeypatch, "--estimate", "--mfu", "0.4", "--json", str(file)) == 0
    printed = capsys.readouterr().out
    assert "estimates" in printed and "an assumption" in printed and "8xH200 40%" in printed
    found = json.loads(file.read_text())["estimates"]
    assert [row["recipe"] for row in found] == list(DEFAULT_RECIPES)
    hours = found[1]["hours"]
    assert hours["H100 0.4"] == hours["H200 0.4"] < hours["A100 0.4"]


def test_measured_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In this process: the command itself takes a new one for each measurement."""
    monkeypatch.setattr(command, "measure_alone", measure)
    file = tmp_path / "steps.json"
    words = ("--recipe", "uhd_v1/pretrain_vicuna7b", "--debug", "--compare", "padded,packed",
             "--steps", "1", "--warmup", "1", "--batch", "2", "--json", str(file))  # fmt: skip
    assert bench(monkeypatch, *words, "--layers", "1") == 0
    printed = capsys.readouterr().out
    for word in ("packed against padded", "per CPU second", "CUT to layers 1", "peak for the MFU"):
        assert word in printed, word
    rows = json.loads(file.read_text())["rows"]
    assert [row["batching"] for row in rows] == ["padded", "packed"]
    assert all(row["layers"] == 1 and len(row["rounds"]) == 1 for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs --recipe"),
        (["--recipe", "uhd_v1/none"], "uhd_v1/none"),
        (["--recipe", "debug/pretrain", "--compare", "padded,wide"], "--compare padded,wide"),
        (["--recipe", "debug/pretrain", "--compare", "packed,packed"], "each once"),
        (["--recipe", "debug/pretrain", "--steps", "0"], "--steps must be at least 1"),
        (["--recipe", "debug/pretrain", "--tower-layers", "0"], "--tower-layers"),
        (["--recipe", "debug/pretrain", "--text-only", "2"], "--text-only a share"),
        (["--estimate", "--mfu", "40"], "--mfu must be shares"),
        (["--estimate", "--devices", "0"], "--devices must be at least 1"),
    ],
)
def test_mistakes(monkeypatch: pytest.MonkeyPatch, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench(monkeypatch, *words)
