"""Schedules of compression: texts, stages over steps and over forward passes, published traces."""

from __future__ import annotations

import json
import logging
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_compression import Published
from torch.nn import functional as F

from llava_uhd.config.compression import (
    SCHEDULES,
    CompressionConfig,
    Schedule,
    Stage,
    after_training,
    parse_schedule,
    resolve_schedule,
)
from llava_uhd.config.model import LlavaUHDConfig, make_part
from llava_uhd.config.recipe import load_recipe
from llava_uhd.errors import UserError
from llava_uhd.language.compressed import decode_compressed
from llava_uhd.train.compression import RunLength, Span, check_length, spans

FINETUNE = "uhd_v1/finetune_vicuna7b"
OFF = Stage(-1, 1)

# --- texts ----------------------------------------------------------------------------------------


def labels(schedule: Schedule) -> str:
    return " ".join(stage.label for stage in schedule.stages)


def test_published_names() -> None:
    texts = {name: labels(parse_schedule(name)) for name in SCHEDULES}
    assert texts == {name: SCHEDULES.get(name) for name in SCHEDULES}
    assert texts["four_stage"] == "2/8 2/2 16/2 off", "wider, then deeper"
    assert texts["four_stage_deeper"] == "2/8 16/8 16/2 off"
    assert {"heavy", "light", "two_stage", "three_stage_deeper", "three_stage_wider"} < set(texts)
    assert labels(parse_schedule("last_stage")) == "2/16 16/16 16/4"


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (32, "2/8 2/2 16/2 off"),
        (40, "3/8 3/2 20/2 off"),  # 2.5 is rounded up
        (28, "2/8 2/2 14/2 off"),
        (24, "2/8 2/2 12/2 off"),  # 1.5 likewise
        (12, "1/8 1/2 6/2 off"),
        (2, "1/8 1/2 1/2 off"),  # never in front of the first layer
    ],
)
def test_names_are_scaled_to_the_depth_and_texts_are_not(layers: int, expected: str) -> None:
    assert labels(resolve_schedule("four_stage", layers)) == expected
    literal = "2/8 2/2 16/2 off"
    assert labels(resolve_schedule(literal, layers)) == literal


def test_what_is_not_between_layers_is_not_scaled() -> None:
    assert [Stage(k, 2).scaled(64).layer for k in (-1, 0, 1, 2)] == [-1, 0, 2, 4]


def test_shares_and_counts() -> None:
    assert parse_schedule("2/8 off").shares == (Fraction(1, 2),) * 2
    uneven = parse_schedule("2/8:0.25 -1/4:.5  off:1/4")
    assert uneven.shares == (Fraction(1, 4), Fraction(1, 2), Fraction(1, 4))
    assert uneven.stages == (Stage(2, 8), Stage(-1, 4), OFF) and not uneven.by_forwards
    thirds = parse_schedule("2/8:1/3 16/8:1/3 off:1/3")
    assert thirds.shares == parse_schedule("three_stage_deeper").shares
    counted = parse_schedule("2/8@1300 2/2@2600 16/2@3900 0/1")
    assert counted.by_forwards and counted.pivots == (1300, 2600, 3900, 10000)
    assert counted.stages[-1] == Stage(0, 1) and counted.stages[-1].label == "off"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("four_stag", "'four_stag' is no stage; did you mean 'four_stage'?"),
        ("4stage", "'4stage' is no stage; did you mean 'four_stage'?"),
        ("light-compression", "did you mean 'light'?"),
        ("2-8 off", "'2-8' is no stage"),
        ("2/8 of", "'of' is no stage; did you mean 'off'?"),
        ("2/8, off", "'2/8,' is no stage"),
        ("2/8:0.5 off:0.4", "the shares add to 0.9, not to 1"),
        ("2/8:0.333 2/2:0.333 off:0.333", r"the shares add to 0.999, not to 1 \(1/3 may stand"),
        ("2/8:1.5 off:-0.5", "the share in '2/8:1.5' must be above 0 and at most 1"),
        ("2/8:0 off:1", "the share in '2/8:0' must be above 0"),
        ("2/8:1/0 off", "the share in '2/8:1/0' must be above 0"),
        ("2/8:0.5 off", "either all stages name their share or none"),
        ("-2/8 off", "the layer in '-2/8' must be at least -1"),
        ("2/0 off", "the stride in '2/0' must be at least 1"),
        ("2/-8", "the stride in '2/-8' must be at least 1"),
        ("2/8@-5 off", "the count in '2/8@-5' must be at least 1"),
        ("2/8@0 off", "the count in '2/8@0' must be at least 1"),
        ("2/8@5 off:0.5", r"counts \(@\) and shares \(:\) exclude each other"),
        ("2/8 2/2@7 off", "only the last stages may leave their count out"),
        ("2/8@1.5 off", "'2/8@1.5' is no stage"),
        ("  ", "it is empty"),
        ("", "it is empty"),
    ],
)
def test_malformed_texts_are_told_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        CompressionConfig(schedule=text)
    message = str(caught.value)
    assert message.startswith(f"compression.schedule '{text}': ") and "\n" not in message
    assert '"2/8 2/2 16/2 off"' in message and "four_stage" in message
    with pytest.raises(UserError, match=r"compression\.schedule '"):
        load_recipe(FINETUNE, [f"--compression.schedule={text or ' '}"])


# --- stages over optimizer steps ------------------------------------------------------------------


def test_quarters_of_the_published_run() -> None:
    assert parse_schedule("four_stage").starts(5198) == (0, 1300, 2599, 3899)
    assert parse_schedule("three_stage_deeper").starts(5198) == (0, 1733, 3465)
    assert parse_schedule("2/8:0.25 off:0.75").starts(10) == (0, 3), "2.5 is rounded up"


@pytest.mark.parametrize(
    ("steps", "stages"),
    [(1, [3]), (2, [2, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 1, 2, 3])],
)
def test_fewer_steps_than_stages_leave_the_first_ones_out(steps: int, stages: list[int]) -> None:
    schedule = parse_schedule("four_stage")
    assert [schedule.stage_at(step, steps) for step in range(steps)] == stages


def test_a_last_stage_of_almost_nothing_has_the_last_step() -> None:
    schedule = parse_schedule("2/8:0.999 off:0.001")
    assert [schedule.stage_at(step, 10) for step in (8, 9)] == [0, 1]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 500))
def test_every_step_has_a_stage_and_the_last_one_the_last(weights: list[int], steps: int) -> None:
    words = [f"2/{index + 2}:{weight}/{sum(weights)}" for index, weight in enumerate(weights)]
    schedule = parse_schedule(" ".join(words))
    stages = [schedule.stage_at(step, steps) for step in range(steps)]
    assert stages == sorted(stages) and stages[-1] == len(weights) - 1
    for index, weight in enumerate(weights):
        wanted = weight * steps / sum(weights)
        # Rounding on both sides, and room for the later stages.
        assert abs(stages.count(index) - wanted) <= 1 + len(weights)
    table = spans(schedule, RunLength(steps, steps, 1))
    found = [n for n, span in enumerate(table) for _ in range(span.first, span.stop)]
    assert found == stages


# --- stages over forward passes -------------------------------------------------------------------


def published_text(layers: list[int], strides: list[int], pivots: list[int]) -> str:
    words = [f"{layer}/{stride}" for layer, stride in zip(layers, strides, strict=True)]
    return " ".join(f"{w}@{p}" for w, p in zip(words, pivots, strict=False)) + "".join(
        f" {word}" for word in words[len(pivots) :]
    )


def test_the_published_counter(golden: Path) -> None:
    """Every entry: the first pass of each stage, and where the published program dies."""
    entries = json.loads((golden / "llavolta/cases/schedule_state_machine.json").read_text())
    assert len(entries) == 9 and sum(entry["error"] is not None for entry in entries) == 2
    for entry in entries:
        text = published_text(entry["layers"], entry["strides"], entry["pivots"])
        schedule, forwards = parse_schedule(text), entry["forwards"]
        changes, before = [], None
        for forward in range(forwards):
            number = schedule.stage_at(forward)
            if number != before:
                stage = schedule.stages[number]
                at = {"first_forward": forward + 1, "layer": stage.layer, "stride": stage.stride}
                changes.append(at)
            before = number
            if schedule.dies_after() == forward + 1:
                break
        assert changes == entry["segments"], text
        config = CompressionConfig(schedule=text)
        if entry["error"] is None:
            check_length(config, RunLength(forwards, forwards, 1))
            continue
        end = entry["error"]["after_forward"]
        assert schedule.dies_after() == end
        for whole in (end - 1, end):  # its error comes inside this pass, which has a stage here
            check_length(config, RunLength(whole, whole, 1))
        for steps, accumulated in ((end + 1, 1), (end // 4 + 1, 4)):
            with pytest.raises(UserError, match=rf"no stage after micro-batch {end}.*add a stage"):
                check_length(config, RunLength(steps, steps * accumulated, accumulated))


def machine(layers: list[int], strides: list[int], pivots: list[int], forwards: int) -> list[Any]:
    """The published stepping, word for word: (layer, stride) of each pass, then "error" or not."""
    layers, strides, pivots = list(layers), list(strides), list(pivots)
    layer, stride, pivot = layers.pop(0), strides.pop(0), pivots.pop(0)
    trace: list[Any] = []
    for counter in range(forwards):
        trace.append((layer, stride))
        if counter % pivot == 0 and counter != 0 and stride > 1:
            if not strides:
                return [*trace, "error"]
            stride, layer = strides.pop(0), layers.pop(0)
            pivot = pivots.pop(0) if pivots else 10000
    return trace


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=5),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
)
def test_the_counter_in_one_formula(strides: list[int], pivots: list[int]) -> None:
    layers = list(range(len(strides)))
    wanted = machine(layers, strides, pivots, 70)
    schedule = parse_schedule(published_text(layers, strides, pivots[: len(layers)]))
    if wanted[-1] == "error":
        wanted.pop()
        assert schedule.dies_after() == len(wanted)
    else:
        assert schedule.dies_after() is None or schedule.dies_after() > 70
    stages = [schedule.stages[schedule.stage_at(forward)] for forward in range(len(wanted))]
    assert [(stage.layer, stage.stride) for stage in stages] == wanted


def test_counts_that_are_never_reached() -> None:
    schedule = parse_schedule("2/8@10000 0/1")
    assert spans(schedule, RunLength(5198, 5198, 1)) == [
        Span(Stage(2, 8), 0, 5198),
        Span(Stage(0, 1), 5198, 5198),
    ]
    ended = spans(parse_schedule("2/8@2 0/1@3 5/2"), RunLength(9, 9, 1))
    assert [(span.first, span.stop) for span in ended] == [(0, 3), (3, 9), (9, 9)]


def test_micro_batches_of_epochs_that_end_early() -> None:
    length = RunLength(steps=7, epoch=5, accumulated=3)
    assert [length.forwards_before(step) for step in range(6)] == [0, 3, 5, 8, 10, 13]
    assert length.forwards == 18 and length.steps_per_epoch == 2
    assert [length.step_of(f) for f in range(10)] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    short = RunLength(steps=3, epoch=2, accumulated=4)
    assert [short.forwards_before(step) for step in range(3)] == [0, 2, 4]


# --- the published traces -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["b_progressive_4stage", "b_progressive_3stage_deeper"])
def test_published_traces(golden: Path, name: str) -> None:
    """Layer, stride and loss of every pass, and the weights behind the last one."""
    published = Published(golden / "llavolta")
    case = json.loads((published.folder / f"cases/{name}.json").read_text())
    text = published_text(case["layers"], case["strides"], case["pivots"])
    config = CompressionConfig(remainder="drop", positions="half", schedule=text)
    schedule = parse_schedule(text)
    language, projector = published.model(case["model"])
    parameters = {f"model.mm_projector.{key}": p for key, p in projector.named_parameters()}
    parameters |= dict(language.named_parameters())
    options = case["optimizer"]
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=options["lr"], betas=tuple(options["betas"]), eps=options["eps"],
        weight_decay=options["weight_decay"],
    )  # fmt: skip
    case["tokenizer_model_max_length"] = None
    with np.load(published.folder / f"cases/{name}.npz") as arrays:
        inputs = dict(arrays)
    for forward, wanted in enumerate(case["trace"]):
        stage = schedule.stages[schedule.stage_at(forward)]
        assert (stage.layer, stage.stride) == (wanted["layer"], wanted["stride"])
        state, batch = config.of_stage(stage), published.batch(case, inputs)
        if state.method == "none":
            hidden = language.model(inputs_embeds=batch.embeds, attention_mask=batch.mask)[0]
            labels = batch.labels
        else:
            result = decode_compressed(language.model, state, batch.runs, batch.embeds, batch.mask)
            assert result.index_map is not None
            hidden, labels = result.hidden, result.index_map.labels(batch.labels)
        assert hidden.shape[1] == wanted["seq_len_last_layer"]
        logits = language.lm_head(hidden)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert loss.item() == pytest.approx(wanted["loss"], abs=1e-3), forward
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(case["final_param_norms"]) == 23
    for key, norm in case["final_param_norms"].items():
        assert parameters[key].norm().item() == pytest.approx(norm, rel=1e-5), key


# --- the section of a recipe and of a model -------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer": -2}, r"compression\.layer must be at least -1, got -2"),
        ({"stride": 0}, r"compression\.stride must be at least 1, got 0"),
        ({"remainder": "round"}, r"compression\.remainder must be keep or drop, got 'round'"),
        ({"positions": "float"}, r"compression\.positions must be integer or half, got 'float'"),
        ({"schedule": "heavy", "layer": 2}, r"leave compression\.layer 2 and .*stride 1 out"),
    ],
)
def test_impossible_values(values: dict[str, Any], message: str) -> None:
    for make in (lambda: CompressionConfig(**values), lambda: part(values)):
        with pytest.raises(UserError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)


def part(values: dict[str, Any]) -> CompressionConfig:
    return make_part(CompressionConfig, values, "compression")


def test_a_schedule_brings_its_method() -> None:
    assert CompressionConfig(schedule="heavy").method == "avgpool1d"
    assert CompressionConfig("fastv", schedule="heavy").method == "fastv"
    recipe = load_recipe(FINETUNE, ["--compression.schedule", "four_stage"])
    assert recipe.compression == CompressionConfig("avgpool1d", schedule="four_stage")
    again = type(recipe).from_dict(recipe.to_dict())
    assert again.compression == recipe.compression, "the written recipe is a recipe"
    sentence = "2/8:0.5 off:0.5"
    for words in ([sentence], sentence.split()):  # quoted or not
        spelt = load_recipe(FINETUNE, ["--model.compression.schedule", *words])
        assert spelt.compression.schedule == sentence


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--compression.schedule four_stage", ("avgpool1d", -1, 1, "four_stage")),
        ("--compression.layer 1 --compression.stride 4", ("avgpool2d", 1, 4, None)),
        ("--compression.stride 4", ("avgpool2d", -1, 4, None)),
        ("--compression.method none", ("none", -1, 1, None)),
        ("--compression.method fastv", ("fastv", -1, 1, "two_stage")),
        ("--compression.schedule null", ("avgpool2d", -1, 1, None)),
    ],
)
def test_the_later_choice_counts(
    tmp_path: Path, words: str, expected: tuple[str, int, int, str | None]
) -> None:
    """Over a recipe with a schedule, and over one with a fixed layer and stride."""
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: {FINETUNE}\ncompression: {{method: avgpool2d, schedule: two_stage}}\n")
    found = load_recipe(file, words.split()).compression
    if words.endswith("four_stage"):
        expected = ("avgpool2d", *expected[1:])
    assert (found.method, found.layer, found.stride, found.schedule) == expected
    file.write_text(f"base: {FINETUNE}\ncompression: {{method: fastv, layer: 2, stride: 8}}\n")
    over = load_recipe(file, ["--compression.schedule", "heavy"]).compression
    assert (over.method, over.layer, over.stride, over.schedule) == ("fastv", -1, 1, "heavy")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("four_stage", ("none", -1, 1)),
        ("last_stage", ("avgpool1d", 6, 4)),
        ("heavy", ("avgpool1d", 1, 8)),
        ("2/8@7 0/1", ("none", -1, 1)),
        ("2/8@7 16/4", ("avgpool1d", 16, 4)),
    ],
)
def test_the_state_after_a_run(schedule: str, expected: tuple[str, int, int]) -> None:
    asked = CompressionConfig(remainder="drop", positions="half", schedule=schedule)
    found = after_training(asked, CompressionConfig(), 12)
    assert (found.method, found.layer, found.stride) == expected
    assert (found.remainder, found.positions, found.schedule) == ("drop", "half", None)
    values = LlavaUHDConfig(compression=found).to_dict()
    assert LlavaUHDConfig.from_dict(values).compression == found


def test_a_checkpoint_that_compressed_is_told(caplog: pytest.LogCaptureFixture) -> None:
    before = CompressionConfig("avgpool1d", 2, 8, "drop", "half")
    with caplog.at_level(logging.WARNING):
        assert after_training(CompressionConfig(remainder="drop"), before, 4).method == "none"
    (record,) = caplog.records
    assert "--compression.method avgpool1d --compression.layer 2 --compression.stride 8" in (
        record.message
    )
    words = record.message.partition("set ")[2].split()
    assert load_recipe(FINETUNE, words).compression == before, "the advice works"
    caplog.clear()
    for asked in (before, CompressionConfig(schedule="heavy")):
        after_training(asked, before, 4)
    after_training(CompressionConfig(), CompressionConfig(), 4)
    assert not caplog.records


def test_a_stride_alone_switches_compression_on() -> None:
    """Layer and stride without a method mean the published one, as at test time."""
    assert CompressionConfig(layer=16, stride=8).method == "avgpool1d"
    assert CompressionConfig(layer=16).method == "none"
