"""Training with a schedule of compression: what each micro-batch gets, logs, and going on."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fixtures_runs import FROM_NOTHING, Train, assert_same_run, break_at, run_here, steps, weights

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.config.compression import CompressionConfig, Stage, parse_schedule
from llava_uhd.errors import UserError
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.train.compression import RunLength, logged, warnings
from llava_uhd.train.log import CURVE_FILE, STAGE, draw_loss, read_log, stage_marks

State = tuple[str, int, int]


def state(config: CompressionConfig | None) -> State | None:
    return None if config is None else (config.method, config.layer, config.stride)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[State | None]:
    """What the model is told in each forward pass of training."""
    original = LlavaUHDForConditionalGeneration.forward
    found: list[State | None] = []

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(state(kwargs.get("compression")))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlavaUHDForConditionalGeneration, "forward", forward)
    return found


def stages_of(folder: Path) -> list[dict[str, Any]]:
    return [entry for entry in read_log(folder) if STAGE in entry]


def saved(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["compression"]


ON8, ON2, OFF = ("avgpool1d", 1, 8), ("avgpool1d", 1, 2), ("none", -1, 1)

# --- what the model is told -----------------------------------------------------------------------


def test_four_stages_at_debug_size(
    train: Train, seen: list[State | None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two layers: the published 2 and 16 of 32 are both scaled to 1."""
    words = ("--debug", "--compression.schedule", "four_stage", "--trainer.max_steps", "6")
    folder = train("uhd_v1/finetune_vicuna7b", "out/four_stage", *words)
    assert seen == [ON8] * 4 + [ON2] * 2 + [ON2] * 4 + [OFF] * 2, "two micro-batches a step"
    printed = capsys.readouterr().out
    for line in (
        "from step 1: compression stage 1 of 4: after layer 1, stride 8",
        "from step 3: compression stage 2 of 4: after layer 1, stride 2",
        "from step 4: compression stage 3 of 4: after layer 1, stride 2",
        "from step 6: compression stage 4 of 4: off",
    ):
        assert printed.count(line) == 1
    assert "compression schedule four_stage (avgpool1d)" in printed and "1 - 2" in printed
    entries = read_log(folder)
    assert all({"compression_layer", "compression_stride"} <= entry.keys() for entry in entries)
    assert [entry["compression_stride"] for entry in entries if "loss" in entry] == [
        *(8, 8, 2, 2, 2, 1)
    ]
    second = {"step": 2, STAGE: 2, "compression_stages": 4, **logged(Stage(1, 2))}
    assert stages_of(folder)[1] == second
    assert [entry["step"] for entry in stages_of(folder)] == [0, 2, 3, 5]
    assert saved(folder) == dataclasses.asdict(CompressionConfig())
    model, _ = load_pretrained(folder)
    assert model.config.compression == CompressionConfig()


def test_without_a_schedule_nothing_is_passed(train: Train, seen: list[State | None]) -> None:
    words = ("debug/pretrain", "out/fixed", "--trainer.max_steps", "1")
    fixed = ("--compression.method", "avgpool1d", "--compression.layer", "1")
    folder = train(*words, *fixed, "--compression.stride", "4")
    assert seen == [None, None], "the model has its own"
    assert not stages_of(folder)
    assert all("compression_stride" not in entry for entry in read_log(folder))
    assert (saved(folder)["layer"], saved(folder)["stride"]) == (1, 4)


# 16 samples, 2 per micro-batch, 3 accumulated: epochs of 3 + 3 + 2 micro-batches.
UNEVEN = ("--trainer.global_batch_size", "6", "--trainer.num_train_epochs", "2")


def test_forward_passes_are_counted_over_epochs_that_end_early(
    train: Train, seen: list[State | None], capsys: pytest.CaptureFixture[str]
) -> None:
    text = "1/8@3 1/2@9 0/1"
    folder = train("debug/pretrain", "out/counted", *UNEVEN, "--compression.schedule", text)
    # One more than the count, then from count to count.
    assert seen == [ON8] * 4 + [ON2] * 6 + [OFF] * 6
    printed = capsys.readouterr().out
    for line in (
        "from step 2, micro-batch 2: compression stage 2 of 3: after layer 1, stride 2",
        "from step 4, micro-batch 3: compression stage 3 of 3: off",
    ):
        assert line in printed
    rows = [line.split() for line in printed.splitlines() if "stride 8" in line and "│" in line]
    assert " ".join(rows[0]) == "│ 1 │ after layer 1, stride 8 │ 1 - 4 │ 1 - 2 │"
    # An entry says what the last micro-batch of its step was.
    assert [entry["compression_stride"] for entry in steps(folder)] == [8, 2, 2, 1, 1, 1]
    assert [entry["step"] for entry in stages_of(folder)] == [0, 1, 3]


@pytest.mark.parametrize(
    "words",
    [
        UNEVEN,
        ("--trainer.max_steps", "5"),
        ("--trainer.num_train_epochs", "1.5"),
        ("--trainer.global_batch_size", "10", "--trainer.num_train_epochs", "2",
         "--trainer.dataloader_drop_last", "true"),
        ("--trainer.global_batch_size", "64", "--trainer.num_train_epochs", "3"),
    ],
)  # fmt: skip
def test_the_planned_length_is_the_trained_one(
    train: Train, seen: list[State | None], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    planned: list[RunLength] = []
    original = RunLength.planned.__func__  # type: ignore[attr-defined]

    def record(cls: type[RunLength], *given: Any) -> RunLength:
        planned.append(original(cls, *given))
        return planned[-1]

    monkeypatch.setattr(RunLength, "planned", classmethod(record))
    name = "out/length_" + "_".join(word.lstrip("-") for word in words)
    folder = train("debug/pretrain", name, "--compression.schedule", "1/4", *words)
    assert len(seen) == planned[0].forwards and planned[0] == planned[-1]
    assert steps(folder)[-1]["step"] == planned[0].steps
    shutil.rmtree(folder)


def test_a_stage_that_is_never_reached_is_not_what_the_model_does(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in the published heavy compression, whose count lies behind the end of its run."""
    words = ("--trainer.max_steps", "2", "--compression.schedule", "1/8@10000 0/1")
    folder = train("debug/pretrain", "out/heavy", *words)
    assert (saved(folder)["method"], saved(folder)["layer"], saved(folder)["stride"]) == ON8
    assert saved(folder)["schedule"] is None
    rows = [line for line in capsys.readouterr().out.splitlines() if "never" in line]
    assert len(rows) == 1 and " 2 " in rows[0] and rows[0].count("never") == 2


# --- going on -------------------------------------------------------------------------------------

SCHEDULES = {
    # Seven steps of two micro-batches; checkpoints after 2, 4 and 6.
    "shares": "1/8:0.29 0/4:0.28 -1/2:0.2 off:0.23",  # from 2, 4 and 5: on and between checkpoints
    "counts": "1/8@2 1/2@6 off",  # from micro-batch 3 and 7: inside the second and fourth step
}
LONG = (*FROM_NOTHING, "--trainer.max_steps", "7", "--trainer.save_steps", "2")


@pytest.fixture(scope="module", params=SCHEDULES)
def unbroken(request: pytest.FixtureRequest, workplace: Path) -> tuple[str, Path]:
    words = (*LONG, "--compression.schedule", SCHEDULES[request.param])
    return request.param, run_here(workplace, "debug/finetune", f"out/{request.param}", *words)


# What a run says when it goes on behind the checkpoints above; nothing where a stage begins there.
RESUMED = {
    "shares": {7: "step 7, in compression stage 4 of 4: off"},
    "counts": {
        3: "step 3, in compression stage 2 of 3: after layer 1, stride 2",
        5: "step 5, in compression stage 3 of 3: off",
        7: "step 7, in compression stage 3 of 3: off",
    },
}


def resumed_line(printed: str) -> str | None:
    found = [line.partition("goes on with ")[2] for line in printed.splitlines()]
    found = [line for line in found if "compression stage" in line]
    assert len(found) <= 1
    return found[0] if found else None


@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_going_on_gives_the_unbroken_run(
    train: Train, unbroken: tuple[str, Path], step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    name, whole = unbroken
    words = ("debug/finetune", f"out/{name}_{step}", *LONG)
    words += ("--compression.schedule", SCHEDULES[name])
    break_at(step, train, *words)
    capsys.readouterr()
    broken = train(*words)
    assert resumed_line(capsys.readouterr().out) == RESUMED[name].get(step)
    assert_same_run(whole, broken)
    assert stages_of(whole) == stages_of(broken), "no stage is logged twice"
    assert saved(whole) == saved(broken)


def test_the_stages_of_these_runs(unbroken: tuple[str, Path]) -> None:
    name, folder = unbroken
    wanted = {"shares": [0, 2, 4, 5], "counts": [0, 1, 3]}[name]
    assert [entry["step"] for entry in stages_of(folder)] == wanted


def test_compression_changes_what_is_learned(train: Train, unbroken: tuple[str, Path]) -> None:
    plain = train("debug/finetune", f"out/plain_{unbroken[0]}", *LONG)
    losses = [[entry["loss"] for entry in steps(each)] for each in (plain, unbroken[1])]
    assert losses[0][0] != pytest.approx(losses[1][0], abs=1e-6)
    head = "language_model.lm_head.weight"
    assert not weights(plain)[head].equal(weights(unbroken[1])[head])


def test_another_schedule_is_another_run(train: Train) -> None:
    words = ("debug/pretrain", "out/other", "--trainer.max_steps", "3", "--trainer.save_steps", "1")
    break_at(2, train, *words, "--compression.schedule", "1/8 off")
    with pytest.raises(UserError, match=r"compression\.schedule was 1/8 off, is 1/4 off"):
        train(*words, "--compression.schedule", "1/4 off")


# --- before training ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compression.schedule", "1/8@2 1/4@5"], "no stage after micro-batch 6, but the run"),
        (["--compression.schedule", "heavyy"], r"compression\.schedule 'heavyy'.*'heavy'"),
        (["--compression.schedule", "1/8:0.5 off:0.4"], "add to 0.9, not to 1"),
        (["--compression.stride", "0"], r"compression\.stride must be at least 1"),
    ],
)
def test_impossible_schedules_leave_no_output_folder(
    train: Train, workplace: Path, words: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train("debug/pretrain", "out/impossible", *words)
    assert "\n" not in str(caught.value)
    assert not (workplace / "out/impossible").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--compression.method avgpool2d --compression.schedule two_stage", "8 is no square"),
        ("--compression.method fastv --compression.schedule 1/4:0.5,0/4:0.5", "at least 1"),
        ("--compression.method fastv --compression.layer 0 --compression.stride 4", "at least 1"),
    ],
)
def test_later_stages_are_tried_before_training(
    train: Train, seen: list[State | None], words: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train("debug/pretrain", "out/later", *(w.replace(",", " ") for w in words.split()))
    assert not seen


def test_settings_without_effect_are_told(
    train: Train, capsys: pytest.CaptureFixture[str], seen: list[State | None]
) -> None:
    """Sixteen tokens a view and two layers."""
    words = ("--trainer.max_steps", "1", "--compression.schedule", "2/32 1/32 40/2 off")
    train("debug/pretrain", "out/told", *words)
    printed = capsys.readouterr().out
    assert "compression 2/32, 40/2 does nothing: the language model has 2 layers" in printed
    assert "with stride 32: a square view has only 16 tokens in this model" in printed
    assert "of which a single one remains" in printed


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("layer 1 stride 4", "compression: after layer 1, stride 4 (avgpool1d)"),
        ("stride 4", "compression: before the language model, stride 4 (avgpool1d)"),
        ("layer 1", "nothing is compressed: compression.stride is 1"),
        ("method fastv", "nothing is compressed: compression.stride is 1"),
    ],
)
def test_a_compression_that_never_changes_is_told(
    train: Train, capsys: pytest.CaptureFixture[str], words: str, told: str
) -> None:
    names, values = words.split()[::2], words.split()[1::2]
    options = [w for n, v in zip(names, values, strict=True) for w in (f"--compression.{n}", v)]
    folder = f"out/never_changes_{'_'.join(words.split())}"
    train("debug/pretrain", folder, "--trainer.max_steps", "1", *options)
    assert told in capsys.readouterr().out


def test_nothing_is_said_without_compression(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    train("debug/pretrain", "out/silent", "--trainer.max_steps", "1")
    assert "compress" not in capsys.readouterr().out


def test_warnings_say_nothing_of_usual_settings(train: Train) -> None:
    folder = train("debug/pretrain", "out/usual", "--trainer.max_steps", "1")
    config = load_pretrained(folder)[0].config
    usual = list(parse_schedule("1/8 0/2 off").stages)
    assert warnings(usual, "keep", config) == []
    assert (
        "none of them remains" in warnings(list(parse_schedule("1/17").stages), "drop", config)[0]
    )


def test_a_checkpoint_that_compresses_is_gone_on_from(
    train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    heavy = ("--compression.method", "avgpool1d", "--compression.layer", "1")
    words = ("debug/finetune", "out/compressing", *FROM_NOTHING, "--trainer.max_steps", "1")
    first = train(*words, *heavy, "--compression.stride", "8")
    assert "compresses" not in caplog.text
    again = ("--debug", "--model.checkpoint", str(first), "--trainer.max_steps", "1")
    folder = train("llava_1_5/task_finetune", "out/on", *again)
    assert "the checkpoint compresses (avgpool1d, after layer 1, stride 8), but" in caplog.text
    assert saved(folder)["method"] == "none"
    caplog.clear()
    kept = train("llava_1_5/task_finetune", "out/on_two", *again, *heavy[:2],
                 "--compression.schedule", "two_stage")  # fmt: skip
    assert "compresses" not in caplog.text and saved(kept)["method"] == "none"


# --- the picture ----------------------------------------------------------------------------------


def test_stages_in_the_picture(tmp_path: Path) -> None:
    def write(entries: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        (tmp_path / "log.jsonl").write_text(text)

    plain = [{"step": step, "loss": 2.0} for step in range(1, 11)]
    begun = [
        {"step": at, STAGE: number, "compression_stages": 4, **logged(stage)}
        for number, (at, stage) in enumerate(
            zip((0, 3, 6, 10), parse_schedule("2/8 2/2 16/2 off").stages, strict=True), start=1
        )
    ]
    marks = stage_marks(begun + plain, 10)
    # (The last stage was announced, and nothing was logged of it.)
    assert [tuple(mark) for mark in marks] == [(0, 3, "2/8"), (3, 6, "2/2"), (6, 10, "16/2")]
    assert stage_marks(plain, 10) == []
    pictures = []
    for entries in (plain, begun + plain):
        write(entries)
        assert draw_loss({"run": tmp_path}, tmp_path / CURVE_FILE)
        pictures.append((tmp_path / CURVE_FILE).read_bytes())
    assert pictures[0] != pictures[1] and pictures[1].startswith(b"\x89PNG")
