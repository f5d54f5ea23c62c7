"""``bench compress``: counts by definition and by a counter, passes, verdict, command."""

from __future__ import annotations

import json
import math
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from llava_uhd.bench import compress
from llava_uhd.bench.__main__ import COMMANDS, main
from llava_uhd.bench.compress import judge, results, time_ratio
from llava_uhd.bench.compress_cost import (
    OFF,
    PRINTED_SCHEDULES,
    Prompt,
    average,
    decoder_flops,
    kept_tokens,
    published_rows,
    scheme_of,
    token_layers,
    visual_by_layer,
)
from llava_uhd.bench.compress_passes import (
    FORWARD,
    WHOLE,
    Task,
    Times,
    make_batch,
    make_model,
    make_pass,
    measure,
)
from llava_uhd.bench.compress_picture import draw_times, label_groups
from llava_uhd.config.compression import SCHEDULES, Schedule, Stage, parse_schedule
from llava_uhd.errors import UserError
from llava_uhd.images.cost import language_shape
from llava_uhd.language.decoder import decode
from llava_uhd.language.loss import supervised_loss

TINY = Task(3, 64, 96, 50, batch=2, visual=20, text=12)
WORDS = ("--layers", "3", "--hidden", "64", "--vocabulary", "50", "--repeats", "2")
WORDS = (*WORDS, "--visual-tokens", "20", "--text-tokens", "12")
STAGES = [OFF, Stage(1, 8), Stage(2, 3), Stage(0, 2), Stage(-1, 4)]


def bench(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", "compress", *words])
    return main()


@pytest.mark.parametrize(
    ("word", "tokens", "percent"),
    [
        ("2/8", 3312, 557),
        ("2/4", 5472, 337),
        ("2/2", 9792, 188),
        ("2/16", 2232, 826),
        ("16/8", 10368, 178),
        ("16/4", 11520, 160),
        ("16/2", 13824, 133),
        ("16/16", 9792, 188),
        ("1/64", 855, 2156),
        ("off", 18432, 100),
    ],
)
def test_one_stage_by_the_definition(word: str, tokens: int, percent: int) -> None:
    """N L / ((N - K) L / s + K L), whole percents."""
    (stage,) = parse_schedule(word).stages
    assert token_layers(stage, 32, 576) == tokens
    layers = max(stage.layer, 0)
    assert tokens == (32 - layers) * 576 // stage.stride + layers * 576
    (row,) = (row for row in published_rows()["stages"] if row["name"] == word)
    assert row["tokens"] == tokens and round(100 * row["ratio"]) == percent


@pytest.mark.parametrize(
    ("name", "tokens", "ratio"),
    [
        ("heavy", 3312, 5.565),
        ("light", 10368, 1.778),
        ("two_stage", 10872, 1.695),
        ("three_stage_deeper", 10704, 1.722),
        ("three_stage_wider", 10512, 1.753),
        ("four_stage", 11340, 1.625),
        ("four_stage_deeper", 11484, 1.605),
        ("last_stage", 7848, 2.349),
    ],
)
def test_averages_of_schedules(name: str, tokens: int, ratio: float) -> None:
    """Ratios follow from the average of the tokens: a harmonic mean of the stages' own."""
    (row,) = (row for row in published_rows()["schedules"] if row["name"] == name)
    assert row["tokens"] == pytest.approx(tokens) and row["ratio"] == pytest.approx(ratio, abs=5e-4)
    each = [18432 / token_layers(stage, 32, 576) for stage in parse_schedule(name).stages]
    assert row["ratio"] == pytest.approx(len(each) / sum(1 / one for one in each))


def test_all_named_schedules_are_told() -> None:
    rows = published_rows()["schedules"]
    assert sorted(row["name"] for row in rows) == SCHEDULES.names()


def test_printed_figures() -> None:
    """Operations as printed to 0.02; tokens and ratios too, but for averages over stages."""
    rows = published_rows()
    for row in rows["stages"]:
        assert abs(100 * row["ratio"] - row["printed_percent"]) < 1
        assert row["printed_tokens"] in (None, row["tokens"])
    for row in [*rows["stages"], *rows["schedules"]]:
        if row["printed_last_tera"] is not None:
            assert row["last_tera_linear"] == pytest.approx(row["printed_last_tera"], abs=0.02)
    odd = {
        row["name"]
        for row in rows["schedules"]
        if row["printed_tokens"] and not math.isclose(row["tokens"], row["printed_tokens"])
    }
    three = {"three_stage_deeper", "three_stage_wider"}
    assert odd == {"two_stage", "four_stage", "four_stage_deeper", *three}
    # What the command says about them.
    for name in ("two_stage", "four_stage_deeper"):
        other = parse_schedule(SCHEDULES.get(name).replace("/8", "/32"))
        tokens = average(other, lambda stage: token_layers(stage, 32, 576))
        assert tokens == PRINTED_SCHEDULES[name].tokens
    for name in three:
        sums = sum(token_layers(stage, 32, 576) for stage in parse_schedule(name).stages)
        assert round(0.33 * sums) == PRINTED_SCHEDULES[name].tokens


@pytest.mark.parametrize(
    ("word", "ratio"),
    [
        ("1/8", 0.250),
        ("2/8", 0.315),
        ("2/2", 0.588),
        ("6/8", 0.575),
        ("6/4", 0.630),
        ("6/2", 0.745),
        ("0/8", 0.185),
    ],
)
def test_ratios_of_operations(word: str, ratio: float) -> None:
    """12 layers, 576 visual and 64 text tokens, logits at all positions that are left."""
    shape = language_shape(Task().config)
    (stage,) = parse_schedule(word).stages
    found, whole = (
        decoder_flops(shape, each, Prompt(576, 64, kept_tokens(each, 576) + 64))
        for each in (stage, OFF)
    )
    assert found / whole == pytest.approx(ratio, abs=0.001)


def test_tokens_of_layers() -> None:
    assert visual_by_layer(Stage(1, 8), 3, 16) == [16, 2, 2]
    assert visual_by_layer(Stage(-1, 8), 2, 17) == visual_by_layer(Stage(0, 8), 2, 17) == [3, 3]
    assert visual_by_layer(OFF, 2, 5) == [5, 5] and kept_tokens(Stage(2, 5), 576) == 116
    four = scheme_of("four_stage", 12)
    assert [stage.label for stage in four.stages] == ["1/8", "1/2", "6/2", "off"]
    assert scheme_of("2/8 5/2 0/1", 4).stages == (Stage(2, 8), OFF, OFF)


def counted(run: Any, mapping: dict[Any, Any] | None = None) -> int:
    with FlopCounterMode(display=False, custom_mapping=mapping or {}) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.label)
@pytest.mark.parametrize("padding", [0, 4])
def test_formula_equals_a_counter(stage: Stage, padding: int) -> None:
    """Equal but for the angles of the rotary embedding: below 1 of 1000."""
    task = Task(3, 64, 96, 50, batch=1 if padding == 0 else 2, visual=20, text=12, padding=padding)
    model, batch = make_model(task), make_batch(task)
    model.set_attn_implementation("eager")
    run = make_pass(model, batch, stage)
    expected = task.flops(stage)
    if padding:  # its second row has fewer logits
        expected -= 2 * padding * task.hidden * task.vocabulary
    assert counted(run) == pytest.approx(expected, rel=1e-3)
    assert counted(lambda: run().backward()) == pytest.approx(3 * expected, rel=1e-3)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.label)
def test_formula_of_the_fused_attention(stage: Stage) -> None:
    """The same operations forward; its backward pass computes the scores again."""
    aten = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    run = make_pass(make_model(TINY), make_batch(TINY), stage)
    expected = TINY.flops(stage)
    again = (expected - TINY.flops(stage, 0)) / 2
    assert counted(run, mapping) == pytest.approx(expected, rel=1e-3)
    whole = counted(lambda: run().backward(), mapping)
    assert whole == pytest.approx(3 * expected + again, rel=1e-3)


@pytest.mark.parametrize("padding", [0, 4])
def test_pass_is_that_of_shorter_embeddings(padding: int) -> None:
    """Before the language model: means in the place of tokens, by hand, give the same loss."""
    task = Task(3, 64, 96, 50, visual=20, text=12, padding=padding)
    model, batch = make_model(task), make_batch(task)
    loss = make_pass(model, batch, Stage(-1, 4))()
    first, last = task.before, task.before + task.visual
    means = batch.embeds[:, first:last].unflatten(1, (5, 4)).mean(2)
    embeds = torch.cat([batch.embeds[:, :first], means, batch.embeds[:, last:]], 1)
    labels, mask = (
        torch.cat([each[:, :first], each[:, first:last:4], each[:, last:]], 1)
        for each in (batch.labels, batch.mask)
    )
    assert int((labels != -100).sum()) == 2 * task.prompt.logits - padding
    states = decode(model, inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(loss, supervised_loss(model.lm_head, states, labels))
    loss.backward()
    assert batch.embeds.grad is not None and bool(batch.embeds.grad.isfinite().all())


def test_turns() -> None:
    times = measure(TINY, [OFF, Stage(1, 4)], 3)
    assert list(times) == [OFF, Stage(1, 4)]
    for each in times.values():
        for clock in (each.cpu, each.wall):
            assert [len(clock[part]) for part in (FORWARD, WHOLE)] == [3, 3]
        assert all(a < b for a, b in zip(each.wall[FORWARD], each.wall[WHOLE], strict=True))


def made_up(parts: dict[Stage, float]) -> dict[Stage, Times]:
    """Times of two turns, the second twice as long."""
    each = {
        stage: {part: [one, 2 * one] for part in (FORWARD, WHOLE)} for stage, one in parts.items()
    }
    return {stage: Times(times, times) for stage, times in each.items()}


def test_ratios_and_verdict() -> None:
    half = Schedule((Stage(2, 8), OFF), (Fraction(1, 4), Fraction(3, 4)))
    assert time_ratio(half, {OFF: 2.0, Stage(2, 8): 1.0}) == pytest.approx(0.875)
    task = Task()
    schemes = {name: scheme_of(name, 12) for name in ("2/8", "four_stage", "off")}
    stages = {stage for scheme in schemes.values() for stage in scheme.stages}
    exact = {stage: task.flops(stage) / task.flops(OFF) for stage in stages}
    rows = results(task, schemes, made_up(exact), "cpu")
    for row in rows[:2]:
        for part in (FORWARD, WHOLE):
            assert row[part]["time_ratio_best"] == pytest.approx(row["flop_ratio"])
            assert row[part]["realised_best"] == pytest.approx(1)
    assert rows[2][WHOLE]["realised_best"] is None and rows[2]["flop_ratio"] == 1
    line, passed = judge(rows)
    assert passed and "heavy (2/8) 100%, four_stage 100%" in line
    slow = {stage: 1 - 0.84 * (1 - one) for stage, one in exact.items()}
    rows = results(task, schemes, made_up(slow), "wall")
    line, passed = judge(rows)
    assert not passed and "heavy (2/8) 84%" in line and "FAILED" in line
    line, passed = judge(rows[2:])
    assert passed and line.startswith("Not judged")


def test_picture(tmp_path: Path) -> None:
    rows = [
        {"scheme": name, "flop_ratio": x, WHOLE: {"time_ratio_best": y, "time_ratio_median": y}}
        for name, x, y in (("a", 0.3, 0.31), ("b", 0.6, 0.6), ("c", 0.31, 0.3))
    ]
    assert [names for names, _ in label_groups(rows)] == [["a", "c"], ["b"]]
    draw_times(rows, 0.85, tmp_path / "times.png")
    assert Image.open(tmp_path / "times.png").size == (672, 672)
    with pytest.raises(UserError, match="--plot"):
        draw_times(rows, 0.85, tmp_path / "nowhere" / "times.png")


def test_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In a process of its own, as it is run."""
    assert compress in COMMANDS
    file, plot = tmp_path / "figures.json", tmp_path / "times.png"
    schemes = ("--schemes", "1/8,2/8,four_stage,7/2,0/2:0.25 off:0.75")
    status = bench(monkeypatch, *WORDS, *schemes, "--json", str(file), "--plot", str(plot))
    printed = " ".join(capsys.readouterr().out.split())
    assert "four_stage: 1/8 1/2 2/2 off" in printed and "10062, 183 %" in printed
    figures = json.loads(file.read_text())
    assert status == (0 if figures["passed"] else 1)
    assert figures["verdict"] in printed and figures["clock"] == "cpu" and figures["mlp"] == 192
    assert set(figures["seconds"]) == {"off", "1/8", "2/8", "1/2", "2/2", "0/2"}
    assert all(len(one["wall"][WHOLE]) == 2 for one in figures["seconds"].values())
    rows = {row["scheme"]: row for row in figures["schemes"]}
    assert rows["1/8"]["token_layers"] == 20 + 3 + 3
    assert rows["1/8"]["compression_ratio"] == pytest.approx(60 / 26)
    assert rows["7/2"]["stages"] == ["off"] and rows["7/2"][WHOLE]["time_ratio_best"] == 1
    assert rows["0/2:0.25 off:0.75"]["shares"] == [0.25, 0.75]
    best = {name: min(one["cpu"][WHOLE]) for name, one in figures["seconds"].items()}
    expected = (best["1/8"] + best["1/2"] + best["2/2"] + best["off"]) / 4 / best["off"]
    assert rows["four_stage"][WHOLE]["time_ratio_best"] == pytest.approx(expected)
    assert Image.open(plot).size == (672, 672)


def test_counting_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delattr(compress, "in_process")
    file = tmp_path / "figures.json"
    assert bench(monkeypatch, "--count-only", "--json", str(file)) == 0
    assert "Measured" not in capsys.readouterr().out
    assert len(json.loads(file.read_text())["published"]["schedules"]) == len(SCHEDULES.names())


def test_other_clocks_and_types() -> None:
    assert compress.clock_of("cpu", 1) == "cpu"
    assert compress.clock_of("cpu", 2) == compress.clock_of("cuda", 1) == "wall"
    half = Task(3, 64, 96, 50, visual=20, text=12, dtype="bfloat16")
    loss = make_pass(make_model(half), make_batch(half), Stage(1, 4))()
    assert loss.dtype == torch.float32 and bool(loss.isfinite())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--layers", "0"), "--layers must be at least 1"),
        (("--repeats", "0"), "--repeats must be at least 1"),
        (("--visual-tokens", "0"), "--visual-tokens must be at least 1"),
        (("--text-tokens", "1"), "--text-tokens must be at least 2"),
        (("--hidden", "100"), "--hidden must be a multiple of 64"),
        (("--mlp", "-1"), "--mlp must be at least 1"),
        (("--padding", "300"), "--padding must leave"),
        (("--device", "nowhere"), "--device nowhere"),
        (("--plot", "times.svg"), r"--plot times.svg: .*\.png"),
        (("--schemes", "2/8,2/8"), "names '2/8' twice"),
        (("--schemes", "2:8"), "'2:8' is no stage"),
        (("--schemes", "four_stages"), "did you mean 'four_stage'"),
        (("--schemes", ""), "it is empty"),
        (("--schemes", "2/8@10 off"), "counts forward passes"),
    ],
)
def test_refusals(monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], told: str) -> None:
    monkeypatch.delattr(compress, "in_process")  # before anything is measured
    with pytest.raises(UserError, match=told) as caught:
        bench(monkeypatch, *words)
    assert "\n" not in str(caught.value)
