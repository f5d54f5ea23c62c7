"""Compression at test time: options over a checkpoint's own, answers kept apart, and tables."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fixtures_tiny import tiny_parts
from rich.console import Console

from llava_uhd.checkpoint.compression import (
    OPTIONS,
    active_settings,
    add_options,
    compress_model,
    folder_name,
    lay_over,
    read_options,
    short_name,
)
from llava_uhd.config.compression import CompressionConfig
from llava_uhd.errors import UserError
from llava_uhd.eval.__main__ import main
from llava_uhd.serve import cli

HEAVY = CompressionConfig("avgpool1d", 2, 8, "drop", "half")
OWN = {"method": "avgpool1d", "layer": 1, "stride": 4}


def read(text: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return read_options(parser.parse_args(text.split()))


def options(**values: Any) -> str:
    return " ".join(f"--compression.{name} {value}" for name, value in values.items())


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "text", "expected"),
    [
        (CompressionConfig(), "", CompressionConfig()),
        (HEAVY, "", HEAVY),
        (
            CompressionConfig(),
            options(layer=16, stride=8),
            CompressionConfig("avgpool1d", 16, 8),
        ),
        (HEAVY, options(layer=16), CompressionConfig("avgpool1d", 16, 8, "drop", "half")),
        (HEAVY, options(method="none"), CompressionConfig()),
        (HEAVY, options(method="none", layer=0, stride=1), CompressionConfig()),
        (HEAVY, options(stride=1), CompressionConfig("avgpool1d", 2, 1, "drop", "half")),
        (
            CompressionConfig(),
            options(method="fastv", layer=2, stride=2, remainder="drop", positions="half"),
            CompressionConfig("fastv", 2, 2, "drop", "half"),
        ),
        (CompressionConfig(), options(layer=-1, stride=4), CompressionConfig("avgpool1d", -1, 4)),
        # What a run in progress has is not what a model does: a schedule never goes on.
        (CompressionConfig(schedule="light"), options(layer=3, stride=2),
         CompressionConfig("avgpool1d", 3, 2)),
    ],
)  # fmt: skip
def test_options_over_a_checkpoint(
    own: CompressionConfig, text: str, expected: CompressionConfig
) -> None:
    before = CompressionConfig(**vars(own))
    assert lay_over(own, read(text)) == expected
    assert own == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (options(layer=16), "--compression.stride is missing"),
        (options(stride=8), "--compression.layer is missing"),
        (options(remainder="drop"), "--compression.stride is missing"),
        (options(layer="x", stride=2), "compression.layer must be a whole number, got 'x'"),
        (options(layer=1.5, stride=2), "compression.layer must be a whole number"),
        (options(layer=2, stride=0), "compression.stride must be at least 1, got 0"),
        (options(layer=-2, stride=2), "compression.layer must be at least -1, got -2"),
        (options(method="avgpool3d", layer=1, stride=2), "did you mean 'avgpool"),
        (options(layer=1, stride=2, remainder="all"), "must be keep or drop, got 'all'"),
        (options(layer=1, stride=2, positions="float"), "must be integer or half, got 'float'"),
        (options(method="fastv", layer=0, stride=2), "set compression.layer to at least 1"),
        (options(method="avgpool2d", layer=1, stride=8), "compression.stride 8 is no square"),
    ],
)
def test_bad_values_are_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        lay_over(CompressionConfig(), read(text))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_nothing_can_mend_is_told_before_a_model_is_loaded() -> None:
    for text in (options(layer="x"), options(method="nothing"), options(stride=0)):
        with pytest.raises(UserError):
            read(text)
    with pytest.raises(UserError, match="no square"):
        read(options(method="avgpool2d", layer=1, stride=8))


@pytest.mark.parametrize("method", ["avgpool1d", "avgpool2d", "random_drop", "fastv"])
def test_an_enormous_stride_is_checked_at_no_cost(method: str) -> None:
    given = read(options(method=method, layer=1, stride=10**12))
    assert lay_over(CompressionConfig(), given).stride == 10**12


def test_names() -> None:
    def names(*values: Any) -> tuple[str, str]:
        settings = active_settings(CompressionConfig(*values), 32)
        return short_name(settings), folder_name(settings)

    assert names("avgpool1d", 16, 8) == ("compression 16/8", "compression-16-8")
    assert names("avgpool1d", -1, 8) == ("compression -1/8", "compression-input-8")
    assert names("fastv", 2, 4, "drop") == (
        "compression fastv 2/4 (drop)",
        "compression-fastv-2-4-drop",
    )
    assert names("avgpool1d", 2, 8, "drop", "half") == (
        "compression 2/8 (drop, half)",
        "compression-2-8-drop-half",
    )
    assert names("random_drop", 2, 8)[1] == "compression-random_drop-2-8"
    for off in (("none",), ("avgpool1d", 32, 8), ("avgpool1d", 2, 1)):
        assert names(*off) == ("", "compression-off")
    assert set(active_settings(HEAVY, 32)) == {f"compression.{name}" for name in OPTIONS}


def test_a_model_that_cannot_be_compressed() -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4}
    model, _ = tiny_parts(gpt2)
    with pytest.raises(UserError, match="works between the layers of"):
        compress_model(model, read(options(layer=1, stride=2)))
    assert model.config.compression == CompressionConfig(), "as it was"
    assert compress_model(model, read(options(layer=-1, stride=2))) is None
    assert model.config.compression.stride == 2


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (CompressionConfig("avgpol1d", 1, 2), "did you mean 'avgpool1d'"),
        (CompressionConfig("fastv", 0, 2), "at least 1"),
    ],
)
def test_a_checkpoint_whose_own_compression_is_impossible(
    own: CompressionConfig, message: str
) -> None:
    """It is told at once, not for each question."""
    model, _ = tiny_parts()
    model.config.compression = own
    with pytest.raises(UserError, match=message):
        compress_model(model, {})
    assert compress_model(model, {"method": "none"}) is None


# --- evaluation -----------------------------------------------------------------------------------


@pytest.fixture
def plain(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "plain")


@pytest.fixture
def compressing(plain: Path, tmp_path: Path) -> Path:
    """The same weights in a checkpoint that compresses by itself."""
    folder = shutil.copytree(plain, tmp_path / "compressing")
    config = json.loads((folder / "config.json").read_text())
    config["compression"] |= OWN
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(checkpoint: Path, questions: Path, *words: str) -> int:
    data = ("--data-root", str(questions), "--device", "cpu")
    return main(["run", str(checkpoint), *data, *" ".join(words).split()])


def said(folder: Path) -> list[str]:
    lines = (folder / "synthetic/answers.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_answers_are_those_of_a_model_that_compresses(
    plain: Path, compressing: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(plain, questions) == 0 == run(compressing, questions)
    assert run(plain, questions, options(layer=1, stride=4)) == 0
    assert "compression 1/4" in capsys.readouterr().out
    assert run(compressing, questions, options(method="none")) == 0
    beside = plain / "eval-compression-1-4"
    assert said(plain / "eval") != said(compressing / "eval")
    assert said(beside) == said(compressing / "eval")
    assert said(compressing / "eval-compression-off") == said(plain / "eval")
    for folder in (beside, compressing / "eval"):
        assert "compression 1/4" in (folder / "results.md").read_text()
        assert "compression 1/4" in (folder / "results.csv").read_text()
        settings = json.loads((folder / "synthetic/settings.json").read_text())["settings"]
        assert {name: settings[f"compression.{name}"] for name in OWN} == OWN
    for folder in (plain / "eval", compressing / "eval-compression-off"):
        assert "compression" not in (folder / "results.md").read_text().split("\n", 1)[1]
    # Scored again, the table says the same.
    before = (beside / "results.md").read_text()
    assert main(["score", str(beside), "--data-root", str(questions)]) == 0
    assert (beside / "results.md").read_text() == before


def test_what_a_checkpoint_does_by_itself_is_no_other_run(
    compressing: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(compressing, questions) == 0
    assert run(compressing, questions, options(**OWN)) == 0
    assert "0 of 8 items to do" in capsys.readouterr().err
    assert [path.name for path in compressing.glob("eval*")] == ["eval"]


def test_answers_are_never_mixed(plain: Path, questions: Path, tmp_path: Path) -> None:
    out = f"--output {tmp_path / 'out'}"
    assert run(plain, questions, out, "--limit 2") == 0
    with pytest.raises(UserError, match=r"compression\.layer was not set, is 1.*--overwrite"):
        run(plain, questions, out, options(layer=1, stride=4))
    assert run(plain, questions, out, "--limit 2 --overwrite", options(layer=1, stride=4)) == 0
    assert "compression 1/4; first 2 of 8 only" in (tmp_path / "out/results.md").read_text()
    with pytest.raises(UserError, match=r"compression\.stride was 4, is 2"):
        run(plain, questions, out, options(layer=1, stride=2))


def test_too_late_a_layer_is_told_and_off(
    plain: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(plain, questions) == 0
    capsys.readouterr()
    assert run(plain, questions, options(layer=2, stride=4)) == 0
    error = capsys.readouterr().err
    assert error.count("compression is off") == 1
    assert "compression.layer 2 is not below the 2 layers of the language model" in error
    assert "0 of 8 items to do" in error
    assert [path.name for path in plain.glob("eval*")] == ["eval"]


# --- chat -----------------------------------------------------------------------------------------


def test_chat_takes_the_same_options(plain: Path, compressing: Path) -> None:
    console = Console(quiet=True)

    def engine(folder: Path, *words: str) -> Any:
        given = ["--model-path", str(folder), "--device", "cpu", *" ".join(words).split()]
        return cli.load_engine(cli.parse_arguments(given), console).model.config.compression

    assert engine(plain) == CompressionConfig()
    assert engine(plain, options(layer=1, stride=4)) == CompressionConfig(**OWN)
    assert engine(compressing) == CompressionConfig(**OWN)
    assert engine(compressing, options(method="none")) == CompressionConfig()
    with pytest.raises(UserError, match="must be at least 1, got 0"):
        engine(plain, options(stride=0))
