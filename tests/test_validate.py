"""The validator tells everything that is wrong at once; training does about it what it is told."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from fixtures_runs import FROM_NOTHING, Train, steps
from llava_files import ROWS, draw_images, talk, turn, write
from PIL import Image

from llava_uhd.config.data import DataConfig
from llava_uhd.config.recipe import load_recipe
from llava_uhd.data import __main__ as command
from llava_uhd.data.dataset import ConversationDataset
from llava_uhd.data.reading import open_records, read_records
from llava_uhd.data.validate import Report, Sampling, validate
from llava_uhd.data.validate_look import Looked, Looker, look_at
from llava_uhd.data.validate_report import HTML_FILE, JSON_FILE, PICTURE_FILE
from llava_uhd.errors import UserError
from llava_uhd.text.processor import LlavaUHDProcessor

# What a mixture can hold: name -> (record, kind of problem, words of the message).
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "broken": ({"image": "cut.jpg", "conversations": talk()}, "broken", "cannot be decoded"),
    "missing": ({"image": "gone.png", "conversations": talk()}, "missing", "gone.png is missing"),
    "role": ({"conversations": [turn("tool", "a"), turn("gpt", "b")]}, "role", "from 'tool'"),
    "count": ({"image": "a.png", "conversations": talk("<image><image>")}, "count",
              "has 1 image(s) but 2 <image>"),
    "empty": ({"conversations": []}, "empty", "'conversations' must be a list"),
    "nothing": ({"image": "zero.png", "conversations": talk()}, "broken", "is empty (0 bytes)"),
    "bomb": ({"image": "bomb.png", "conversations": talk()}, "broken", "limit of 178956970 pixels"),
    "outside": ({"image": "../a.png", "conversations": talk()}, "path", "must stay inside"),
    "order": ({"conversations": [*talk("a"), turn("gpt", "b")]}, "order", "must alternate"),
    "half": ({"conversations": talk("\ud800")}, "text", "not valid Unicode"),
}  # fmt: skip
LONG = {"id": "long", "conversations": talk("word " * 40_000)}


def png_of(width: int, height: int) -> bytes:
    """The header of a picture of any size, and next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = draw_images(tmp_path_factory.mktemp("images"))
    Image.radial_gradient("L").save(root / "cut.jpg")
    (root / "cut.jpg").write_bytes((root / "cut.jpg").read_bytes()[:2000])
    (root / "zero.png").write_bytes(b"")
    (root / "bomb.png").write_bytes(png_of(60_000, 60_000))
    return root


@pytest.fixture(scope="module")
def processor() -> LlavaUHDProcessor:
    from llava_uhd.checkpoint.recipe_parts import read_processor
    from llava_uhd.data.demo_tokenizer import build_demo_tokenizer

    return read_processor(load_recipe("debug/finetune").model, build_demo_tokenizer)


def mixture(tmp_path: Path, names: list[str], lines: bool) -> tuple[Path, dict[str, int]]:
    """A mixture of two files, the bad records spread over the second; their places in it."""
    ending = "jsonl" if lines else "json"
    write(tmp_path / f"good.{ending}", ROWS, lines)
    rows: list[dict[str, Any]] = []
    places = {}
    for name in names:
        rows.append(ROWS[len(rows) % 4])
        places[name] = len(rows)
        rows.append({"id": f"id {name}", **BAD[name][0]})
    rows.append(LONG)
    write(tmp_path / f"bad.{ending}", rows, lines)
    mix = tmp_path / "mix.yaml"
    entries = [{"json_path": f"{name}.{ending}"} for name in ("good", "bad")]
    mix.write_text(yaml.safe_dump({"datasets": entries}))
    return mix, places


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_everything_is_told(
    tmp_path: Path, folder: Path, processor: LlavaUHDProcessor, lines: bool, workers: int
) -> None:
    mix, places = mixture(tmp_path, list(BAD), lines)
    config = DataConfig(path=str(mix), image_folder=str(folder))
    report = validate(config, processor, Sampling(None, workers))
    file = str(tmp_path / f"bad.{'jsonl' if lines else 'json'}")
    told = {problem.id: problem for problem in report.problems}
    assert len(report.problems) == len(BAD)
    for name, (_, kind, words) in BAD.items():
        problem = told[f"id {name}"]
        assert (problem.kind, problem.file, problem.record) == (kind, file, places[name])
        assert words in problem.what and problem.advice and problem.outcome == "stops"
        assert problem.line().startswith(f"{file}, record {places[name]} (id 'id {name}'): ")
    (entry,) = report.overlong
    assert (entry["file"], entry["record"], entry["id"]) == (file, 2 * len(BAD), "long")
    assert entry["tokens"] > 40_000 and entry["outcome"] == "cut to 2048"
    assert report.stops
    assert report.counts["records"] == 4 + 2 * len(BAD) + 1
    assert [source["usable"] for source in report.sources] == [4, len(BAD) + 1 + 3]
    assert report.images["images"] == len(report.sizes) and report.tokens["total"]["max"] > 40_000


def test_good_data_are_good(tmp_path: Path, folder: Path, processor: LlavaUHDProcessor) -> None:
    file = write(tmp_path / "data.json", ROWS)
    config = DataConfig(path=str(file), image_folder=str(folder))
    report = validate(config, processor)
    assert not report.problems and not report.stops and not report.overlong
    dataset = ConversationDataset(open_records(config), processor, config)
    lengths = [len(dataset[index]["input_ids"]) for index in range(4)]  # type: ignore[arg-type]
    visual = [dataset[index]["num_visual_tokens"] for index in range(4)]  # type: ignore[index]
    assert report.lengths[:, 0].tolist() == report.lengths[:, 2].tolist() == lengths
    # Separators between slices count among the tokens of an image.
    assert all(told >= own for told, own in zip(report.lengths[:, 1], visual, strict=True))
    assert report.sizes[:2].tolist() == [[60, 40], [60, 40]]
    assert report.tokens["without_learned"] == 0


def test_long_samples_are_found_outside_of_the_sample(
    tmp_path: Path, folder: Path, processor: LlavaUHDProcessor
) -> None:
    rows = [{"id": f"r{i}", "conversations": talk(f"Hi {i}.")} for i in range(50)]
    pictured = {"id": "pictured", "image": "a.png", "conversations": talk("<image> " + "so " * 900)}
    file = write(tmp_path / "data.json", [*rows, pictured, LONG])
    config = DataConfig(path=str(file), image_folder=str(folder), max_length=1200)
    report = validate(config, processor, Sampling(1))
    assert [entry["id"] for entry in report.overlong] == ["long", "pictured"]
    assert len(report.lengths) == 1 and report.counts["looked_at"] <= 3
    tail = {"id": "tail", "image": "a.png", "conversations": talk("so " * 2000 + "<image>")}
    config = DataConfig(path=str(write(file, [tail])), image_folder=str(folder), image_first=False)
    (problem,) = validate(config, processor).problems
    assert problem.kind == "overlong" and "would lose 1 of 1 images" in problem.what
    config.overlong = "drop"
    report = validate(config, processor)
    assert not report.stops and report.overlong[0]["outcome"].startswith("cut to ")


UNREADABLE: list[tuple[bytes, list[int], str]] = [
    (b'{"id": 1, "conv', [0], "line 1 is not valid JSON"),
    (b"GOOD\nGOOD\n{\"id\": 3, \"conversa\nGOOD\nGOOD", [2], "line 3 is not valid JSON"),
    (b"GOOD\n\xff\xfe\nGOOD\n[1,\n", [1, 3], "is not a UTF-8 text"),
    (b"[GOOD, GOOD", [2], "not valid JSON at record 2: .* .cut short"),
    (b"[GOOD, GOOD, \x80]", [2], "not a UTF-8 text file near record"),
    (b"[" * 100_000, [0], "nested too deeply"),
    (b"GOOD\n" + b'{"a":' * 100_000, [1], "nested too deeply"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "places", "message"), UNREADABLE)
def test_files_that_cannot_be_read(
    tmp_path: Path, content: bytes, places: list[int], message: str
) -> None:
    good = json.dumps({"conversations": talk("Hi.")}).encode()
    file = tmp_path / "data.json"
    file.write_bytes(content.replace(b"GOOD", good))
    report = validate(DataConfig(path=str(file)))
    told = [problem for problem in report.problems if problem.kind == "unreadable"]
    assert len(report.problems) == len(told) == len(places)
    # A list is decoded in stretches: what is no text is met a little before its record.
    assert all(a.record is not None and a.record <= b for a, b in zip(told, places, strict=True))
    assert re.search(message, told[0].what)
    with pytest.raises(UserError, match=message):
        read_records(file, None)


def test_sources_that_cannot_be_used(tmp_path: Path, folder: Path) -> None:
    """All of them are told, and the others are looked at."""
    write(tmp_path / "good.json", ROWS)
    write(tmp_path / "empty.json", [])
    entries: list[Any] = [
        {"json_path": "gone.json"},
        {"json_path": "good.json"},
        {"json_path": "good.json", "sampling_strategy": "first:9"},
        {"json_path": "empty.json"},
        {"json_path": "good.json", "image_folder": "nowhere"},
        {"json_pth": "good.json"},
    ]
    mix = tmp_path / "mix.yaml"
    mix.write_text(yaml.safe_dump({"datasets": entries}))
    paths = [str(mix), str(tmp_path / "lost.json")]
    report = validate(DataConfig(path=paths, image_folder=str(folder)))
    told = "\n".join(problem.what for problem in report.problems)
    words = ("gone.json does not exist", "first:9' asks for 9", "empty.json.* holds no records",
             "nowhere does not exist", "unknown key", "lost.json does not exist")  # fmt: skip
    assert all(re.search(each, told) for each in words) and len(report.problems) == 6
    assert report.counts["usable"] == 4


def test_words_stand_for_tokens_without_a_tokenizer(tmp_path: Path, folder: Path) -> None:
    file = write(tmp_path / "data.json", ROWS)
    report = validate(DataConfig(path=str(file), image_folder=str(folder)))
    records = read_records(file, folder)
    assert report.lengths[:, 0].tolist() == [abs(each) for each in records.modality_lengths]
    assert report.tokens["unit"] == "words" and "words here" in report.notes[0]
    assert report.tokens["total"]["max"] == 7 and not report.overlong


def test_repeated_ids_are_told(tmp_path: Path) -> None:
    rows = [{"id": name, "conversations": talk("Hi.")} for name in ("a", "b", "a", "", "", "a")]
    report = validate(DataConfig(path=str(write(tmp_path / "data.json", rows))))
    assert report.counts["repeated_ids"] == 2 and "'a' (3 times)" in report.notes[-1]
    assert not report.stops


class _Deadly(Looker):
    def __call__(self, index: int) -> Looked:
        if index in (3, 40):
            os._exit(9)
        return Looked(index)


def test_a_file_that_kills_its_process(tmp_path: Path) -> None:
    rows = [{"id": str(i), "conversations": talk("Hi.")} for i in range(100)]
    records = read_records(write(tmp_path / "data.json", rows), None)
    looker = _Deadly(records, None, None)
    found = list(look_at(looker, range(100), 2))
    assert sorted(looked.index for looked in found) == list(range(100))
    dead = {looked.index: looked.broken for looked in found if looked.broken}
    assert set(dead) == {3, 40} and "was killed" in dead[3][0]


# --- the command ----------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["data", "validate", *words])
    return command.main()


def test_command_and_report(
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mix, places = mixture(tmp_path, list(BAD), False)
    monkeypatch.chdir(tmp_path)
    words = ["--data.embedded", "null", "--data.path", str(mix), "--data.image_folder", str(folder)]
    status = run(monkeypatch, "debug/finetune", *words, "--images", "all", "--workers", "1")
    assert status == 1
    out = capsys.readouterr().out
    assert f"bad.json, record {places['role']} (id 'id role'): turn 0 is from 'tool'" in out
    assert "training would stop" in out
    place = tmp_path / "data_report/debug_finetune"
    values = json.loads((place / JSON_FILE).read_text())
    assert values["would_stop_training"] and len(values["problems"]) == len(BAD)
    assert values["counts"]["problems"]["broken"] == 3
    page = (place / HTML_FILE).read_text()
    assert "Training on these data would stop" in page and "data:image/png;base64," in page
    assert "2 &lt;image&gt; marker" in page and "2 <image>" not in page
    with Image.open(place / PICTURE_FILE) as picture:
        assert picture.width > 1000 and picture.height > 300
    good = write(tmp_path / "good.json", ROWS)
    words = [str(good), "--image-folder", str(folder), "--report", "other", "--workers", "0"]
    assert run(monkeypatch, *words) == 0
    assert (tmp_path / "other" / HTML_FILE).is_file()
    assert "nothing here would stop training" in capsys.readouterr().out
    with pytest.raises(UserError, match="--images some must be a number, or all"):
        run(monkeypatch, str(good), "--images", "some")
    with pytest.raises(UserError, match="only a recipe takes overrides"):
        run(monkeypatch, str(good), "--data.max_length", "5")
    assert run(monkeypatch, "debug/pretrain", "--images", "2", "--workers", "0") == 0


# --- what training does ---------------------------------------------------------------------------

SIX = ["broken", "missing", "role", "count", "empty"]  # and the record of 40,000 words


def words_of(mix: Path, folder: Path, *more: str) -> list[str]:
    return [
        *FROM_NOTHING, "--data.embedded", "null", "--data.path", str(mix), "--data.image_folder",
        str(folder), "--trainer.max_steps", "4", "--data.preview", "0", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("name", [*SIX, "all"])
def test_training_stops(train: Train, tmp_path: Path, folder: Path, name: str) -> None:
    mix, places = mixture(tmp_path, SIX if name == "all" else [name], False)
    with pytest.raises(UserError) as caught:
        # (The long record alone would be refused for the answer that its cut takes away.)
        words = words_of(mix, folder, "--data.max_unlearned", "1")
        train("debug/finetune", f"out/stops_{name}", *words)
    message = str(caught.value)
    if name == "all":  # what is wrong with records is told before files are
        for each in ("role", "count", "empty"):
            assert f"{tmp_path / 'bad.json'}, record {places[each]}: " in message
            assert BAD[each][2] in message
    else:
        assert f"bad.json, record {places[name]}" in message and BAD[name][2] in message


@pytest.mark.parametrize("workers", ["0", "2"])
def test_training_leaves_out(
    train: Train,
    tmp_path: Path,
    folder: Path,
    workers: str,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mix, places = mixture(tmp_path, SIX, True)
    more = ["--data.on_broken_image", "skip", "--data.on_wrong_record", "skip"]
    more += ["--data.max_broken", "0.5", "--trainer.dataloader_num_workers", workers]
    output = train("debug/finetune", f"out/leaves_{workers}", *words_of(mix, folder, *more))
    assert len(steps(output)) == 4
    manifest = json.loads((output / "data_manifest.json").read_text())
    assert (manifest["samples"], manifest["left_out"]) == (15 - 4, 4)
    for name in ("missing", "role", "count", "empty"):
        assert f"bad.jsonl, record {places[name]}: " in caplog.text
    # The broken image and the long record are met on the way: 16 samples of 11 were drawn.
    counts = json.loads((output / "llava_uhd.json").read_text())["data"]
    assert counts["broken"] >= 1 and counts["truncated_samples"] >= 1
    assert counts["truncated_tokens"] > 30_000
    assert "broken: " in capsys.readouterr().out
    # Too many of them are an error.
    with pytest.raises(UserError, match="4 of 15 records would be left out, more than the allowed"):
        few = ["--data.on_broken_image", "skip", "--data.on_wrong_record", "skip"]
        train("debug/finetune", f"out/too_many_{workers}", *words_of(mix, folder, *few))


def test_the_validator_knows_what_training_does(tmp_path: Path, folder: Path) -> None:
    mix, _ = mixture(tmp_path, SIX, False)
    config = DataConfig(path=str(mix), image_folder=str(folder), on_broken_image="skip")

    def outcomes(report: Report) -> dict[str, str]:
        return {problem.kind: problem.outcome for problem in report.problems}

    told = outcomes(validate(config))
    assert told["broken"] == told["missing"] == "left out" and told["role"] == "stops"
    config.on_wrong_record, config.max_broken = "skip", 0.5
    report = validate(config)
    assert set(outcomes(report).values()) == {"left out"} and not report.stops
    assert any("5 of 15 records would be left out" in note for note in report.notes)
    config.max_broken = 0.1
    report = validate(config)
    assert report.stops and "more than data.max_broken" in report.problems[-1].what
