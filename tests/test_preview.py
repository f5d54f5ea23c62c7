"""What is shown before a run, and when it is refused."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fixtures_model import call
from fixtures_qwen import save_tokenizer
from fixtures_runs import FROM_NOTHING, Train, break_at
from llava_files import ROWS, draw_images, talk, write
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from llava_uhd.checkpoint.recipe_parts import read_processor
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.config.recipe import load_recipe
from llava_uhd.config.training import DataConfig
from llava_uhd.data.dataset import ConversationDataset, build_dataset
from llava_uhd.data.demo_tokenizer import build_demo_tokenizer
from llava_uhd.errors import UserError
from llava_uhd.images.video import frame_size
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.train import preview as preview_module
from llava_uhd.train.drawn import DATA_FILE
from llava_uhd.train.embedded import demo_tokenizer
from llava_uhd.train.preview import (
    check_template,
    count_learned,
    look,
    pieces,
    preview,
    shorten,
    spread,
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"))


def make_processor(
    tokenizer: PreTrainedTokenizerBase, template: str = "v1", mode: str = "clean"
) -> LlavaUHDProcessor:
    config = LlavaUHDConfig(
        image={"scale_resolution": 32, "patch_size": 8},
        projector={"num_queries": 4},
        template=template,
    )
    processor = LlavaUHDProcessor.from_parts(tokenizer, config)
    processor.template_mode = mode
    return processor


@pytest.fixture(scope="module")
def llama() -> LlavaUHDProcessor:
    return make_processor(build_demo_tokenizer())


@pytest.fixture
def data(folder: Path, tmp_path: Path) -> DataConfig:
    path = write(tmp_path / "data.json", ROWS)
    return DataConfig(path=str(path), image_folder=str(folder), max_length=None)


def shown(dataset: ConversationDataset, **options: Any) -> str:
    stream = io.StringIO()
    preview(dataset, Console(file=stream, width=100, **options))
    return stream.getvalue()


def test_spread() -> None:
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 64) == [0, 1, 2] and spread(0, 64) == []
    places = spread(1_000_003, 64)
    assert len(set(places)) == 64 and places[-1] < 1_000_003


def test_learned_tokens_in_brackets(data: DataConfig, llama: LlavaUHDProcessor) -> None:
    text = shown(build_dataset(data, llama))
    file = data.path
    # Slices of 4 tokens, each with its separator, and the overview.
    count = llama.num_image_tokens(60, 40)
    assert count == 2 * 5 + 4
    start, _, rest = text.partition(f"<image: {count} tokens>")
    assert f"{file}, record 0 (id 'one'): " in start and "learned (in [[ ]])" in start
    assert "USER: " in start and "[[" not in start.split("\n", 1)[1]
    assert rest.startswith("\nWhat is it? ASSISTANT:[[ A sign.</s>]]\n")
    assert f"{file}, record 1 (id '2'): " in rest and "USER: Hello. ASSISTANT:[[ Hi.</s>]]" in rest
    assert "record 2" not in text, "two samples are shown"
    assert "4 samples checked: " in text and "; 0 have no learned token" in text
    assert "\x1b" not in text


def test_colours(data: DataConfig, llama: LlavaUHDProcessor) -> None:
    dataset = build_dataset(replace(data, preview=1), llama)
    text = shown(dataset, force_terminal=True, color_system="truecolor")
    assert "\x1b[1;32m A sign.</s>\x1b[0m" in text and "[[" not in text
    assert "\x1b[36m<image: 14 tokens>\x1b[0m" in text


def test_nothing_is_shown_when_off(data: DataConfig, llama: LlavaUHDProcessor) -> None:
    dataset = build_dataset(replace(data, preview=0), llama)
    assert shown(dataset).startswith("4 samples checked: ")
    preview(dataset, None)
    assert dataset.counts["samples"] == 0, "no picture was read"


def test_counts_are_those_of_training(data: DataConfig, llama: LlavaUHDProcessor) -> None:
    """Labels, cuts and lengths from headers are those of the samples themselves."""
    whole = build_dataset(data, llama)
    longest = max(whole.token_length(index) for index in range(4))
    for length in (None, longest - 1, 60, 50):
        dataset = build_dataset(replace(data, max_length=length, overlong="drop"), llama)
        for index in range(4):
            sample, trained = look(dataset, index), dataset[index]
            assert isinstance(trained, dict)
            assert sample.encoding.labels == trained["labels"].tolist()
            assert sample.learned == int((trained["labels"][1:] != -100).sum())
            assert sample.total - len(sample.encoding.input_ids) == trained["truncated_tokens"]
            text = [piece for piece in pieces(sample, llama.tokenizer) if piece.kind != "visual"]
            learned = "".join(piece.text for piece in text if piece.kind == "learned")
            if length is None:
                answers = [turn.text for turn in dataset.records[index].turns[1::2]]
                assert learned == "".join(f" {answer}</s>" for answer in answers)


def test_long_texts_lose_their_middle() -> None:
    text = "a" * 400 + "b" * 1000 + "c" * 200
    assert shorten(text) == "a" * 400 + "b" * 100 + " <... 900 characters ...> " + "c" * 200
    assert shorten("short") == "short"


# --- refusals -------------------------------------------------------------------------------------


def test_marks_that_the_tokenizer_spells_out(
    data: DataConfig, llama: LlavaUHDProcessor, tmp_path: Path
) -> None:
    chatml = make_processor(build_demo_tokenizer(), "qwen_1_5")
    with pytest.raises(UserError, match="template 'qwen_1_5' does not fit the tokenizer: ") as one:
        preview(build_dataset(data, chatml), None)
    assert "<|im_start|>, <|im_end|> must be tokens of their own" in str(one.value)
    assert "written as '\u2581 < | im _ start | >'" in str(one.value).replace("i m", "im").replace(
        "s t a r t", "start"
    )
    # The other way round: Vicuna's template ends with a mark of Llama's vocabulary.
    qwen = save_tokenizer(tmp_path / "qwen")
    with pytest.raises(UserError, match=r"does not fit the tokenizer: </s> must be"):
        preview(build_dataset(data, make_processor(qwen)), None)
    check_template(llama)
    check_template(make_processor(qwen, "qwen_1_5"))
    preview(build_dataset(replace(data, max_unlearned=1), make_processor(qwen)), None)


def test_published_labels_with_a_foreign_tokenizer(data: DataConfig, tmp_path: Path) -> None:
    """The "tokenization mismatch": the published code masks every sample and goes on."""
    qwen = save_tokenizer(tmp_path / "qwen")
    qwen.add_special_tokens({"additional_special_tokens": ["</s>"]})
    answered = [*talk(answer="A sign."), *talk("Why?", "So.")]
    rows = [{"id": "one", "image": "a.png", "conversations": answered}] * 4
    data.path = str(write(tmp_path / "rounds.json", rows))
    dataset = build_dataset(data, make_processor(qwen, mode="faithful"))
    assert all(count_learned(dataset.encoding(index)) == 0 for index in range(4))
    with pytest.raises(UserError, match="4 of 4 samples that were checked have no learned") as one:
        preview(dataset, None)
    message = str(one.value)
    assert (
        "more than data.max_unlearned (0.1) allows: the published code of template 'v1'" in message
    )
    assert "set model.template_mode to clean" in message
    assert "The first of them, " in message and "record 0 (id 'one')" in message
    assert (
        "<image: 14 tokens>\nWhat? ASSISTANT: A sign.</s>USER: Why? ASSISTANT: So.</s>" in message
    )
    preview(build_dataset(data, make_processor(qwen)), None)


def test_empty_answers(tmp_path: Path) -> None:
    """As published nothing of them is learned, otherwise their end token is."""
    answers = ("red", "", "", "blue")
    rows = [{"id": i, "conversations": talk("What?", each)} for i, each in enumerate(answers)]
    data = DataConfig(path=str(write(tmp_path / "data.json", rows)), max_unlearned=0.4)
    published = make_processor(build_demo_tokenizer(), mode="faithful")
    with pytest.raises(UserError, match="2 of 4 samples .*: their answers are empty") as one:
        preview(build_dataset(data, published), None)
    assert "The first of them, " in str(one.value) and "record 1 (id '1')" in str(one.value)
    preview(build_dataset(replace(data, max_unlearned=0.5), published), None)
    preview(
        build_dataset(replace(data, max_unlearned=0), make_processor(build_demo_tokenizer())), None
    )


def test_answers_that_a_cut_takes_away(data: DataConfig, llama: LlavaUHDProcessor) -> None:
    length = look(build_dataset(data, llama), 1).total - 3  # " Hi.</s>" are three tokens
    dataset = build_dataset(replace(data, max_length=length, overlong="drop"), llama)
    with pytest.raises(UserError, match=rf"the cut at data\.max_length {length} takes their"):
        preview(dataset, None)
    dataset.config.overlong = "error"
    with pytest.raises(
        UserError, match=r"record 0 \(id 'one'\): the sample has .* would lose 1 of"
    ):
        preview(dataset, None)


@pytest.mark.parametrize(("bad", "refused"), [(10, False), (11, True)])
def test_a_share_may_be_without(
    bad: int, refused: bool, llama: LlavaUHDProcessor, tmp_path: Path
) -> None:
    """Of 100 samples all are checked; up to a tenth may have nothing to learn."""
    word = "colour " * 60
    rows = [{"conversations": talk(word if i < bad else "Hi.", "red")} for i in range(100)]
    path = str(write(tmp_path / "data.json", rows))
    dataset = build_dataset(DataConfig(path=path, max_length=90), llama)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(preview_module, "CHECKED", 100)
        if refused:
            with pytest.raises(UserError, match="11 of 100 samples that were checked"):
                preview(dataset, None)
        else:
            preview(dataset, None)
            assert "; 10 have no learned token" in shown(dataset)


def test_broken_files(data: DataConfig, llama: LlavaUHDProcessor, tmp_path: Path) -> None:
    rows = [{"id": "bad", "image": "broken.png", "conversations": talk()}, *ROWS]
    (Path(str(data.image_folder)) / "nothing.png").write_bytes(b"no picture")
    rows[0]["image"] = "nothing.png"
    data.path = str(write(tmp_path / "broken.json", rows))
    with pytest.raises(UserError, match=r"record 0 \(id 'bad'\): image .*nothing\.png cannot be"):
        preview(build_dataset(data, llama), None)
    text = shown(build_dataset(replace(data, on_broken_image="skip", max_broken=0.5), llama))
    assert "record 0" not in text and "record 1 (id 'one')" in text and "4 samples checked" in text


# --- in a run -------------------------------------------------------------------------------------


def run_preview(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["preview", *words])
    preview_module.main()


def test_the_command_shows_what_a_run_shows(
    train: Train,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train("debug/pretrain", "out/shown", "--trainer.max_steps", "1")
    ran = capsys.readouterr().out
    monkeypatch.setattr("llava_uhd.checkpoint.load.build_model", None)  # no model is built
    run_preview(monkeypatch, workplace, "debug/pretrain")
    told = capsys.readouterr().out
    assert "record 1 (id 'pretrain-1'): " in told and "<image: 16 tokens>[[" in told
    assert told in ran
    manifest = json.loads((workplace / "out/shown" / DATA_FILE).read_text(encoding="utf-8"))
    assert manifest["samples"] == 16 and manifest["sources"][0]["drawn"] == 16


@pytest.mark.slow
def test_as_typed(data: DataConfig, tmp_path: Path) -> None:
    """The command shows and leaves no output folder."""
    words = ("--data.path", str(data.path), "--data.image_folder", str(data.image_folder))
    module = "llava_uhd.train.preview"
    status, out, error = call(module, "debug/finetune", *FROM_NOTHING, *words, cwd=tmp_path)
    assert status == 0 and "[[" in out, error
    assert not (tmp_path / "checkpoints").exists()


def test_samples_that_do_not_fit_the_template(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--data.path", str(data.path), "--data.image_folder", str(data.image_folder))
    with pytest.raises(UserError, match=r"record 1 \(id '2'\): the plain template takes one human"):
        run_preview(monkeypatch, tmp_path, "debug/pretrain", *words)


def test_records_of_every_kind(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("onevision/stage2_ov_qwen2_7b", "--debug", "--data.preview", "4")
    run_preview(monkeypatch, workplace, *words)
    told = capsys.readouterr().out
    assert "id 'mixed-1'" in told and "id 'mixed-3'" in told
    film = told.split("id 'mixed-2'")[1]
    processor = read_processor(load_recipe(words[0], list(words[1:])).model, demo_tokenizer)
    assert (processor.video_config.max_frames, processor.video_config.fps) == (3, 1)
    frames = workplace / "playground/data/debug_mixed/videos/000002"
    tokens = processor.num_video_tokens(3, *frame_size(frames))
    assert f"<video: {tokens} tokens>" in film.split("id 'mixed-3'")[0]


def test_a_run_that_would_learn_nothing_does_not_start(
    train: Train, workplace: Path, tmp_path: Path
) -> None:
    rows = [{"id": i, "conversations": talk("What? " * 50)} for i in range(4)]
    path = str(write(tmp_path / "data.json", rows))
    words = (*FROM_NOTHING, "--data.path", path, "--data.max_length", "40")
    with pytest.raises(UserError, match=r"4 of 4 samples .*data\.max_length 40 takes"):
        train("debug/finetune", "out/nothing", *words)
    assert not list((workplace / "out/nothing").glob("checkpoint-*"))


def test_a_mixture_is_told_and_watched(
    train: Train, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": f"r{i}", "conversations": talk(f"Say {i}.", f"{i}")} for i in range(12)]
    write(tmp_path / "a.json", rows)
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(
        "datasets:\n"
        "  - {json_path: a.json, sampling_strategy: first:50%}\n"
        "  - {json_path: a.json, sampling_strategy: random:4, seed: 3}\n"
    )
    words = (*FROM_NOTHING, "--data.path", str(mixture), "--trainer.max_steps", "3")
    words += ("--trainer.save_steps", "1")
    break_at(2, train, "debug/finetune", "out/mixed", *words)
    told = capsys.readouterr().out
    assert "first:50%" in told and "random:4" in told and "10 samples; global batch" in told
    manifest = json.loads((workplace / "out/mixed" / DATA_FILE).read_text(encoding="utf-8"))
    assert [each["drawn"] for each in manifest["sources"]] == [6, 4]
    # Whether and how much is shown is no other run; other data are.
    train("debug/finetune", "out/mixed", *words, "--data.preview", "1", "--trainer.max_steps", "3")
    assert "Going on from" in capsys.readouterr().out
    break_at(2, train, "debug/finetune", "out/changed", *words)
    write(tmp_path / "a.json", [*rows[:11], {"id": "other", "conversations": talk("Say.", "No")}])
    with pytest.raises(UserError, match=r"the data have changed since .*file_sha256 of .*a\.json"):
        train("debug/finetune", "out/changed", *words)
