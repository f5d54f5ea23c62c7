from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from llava_files import ROWS, draw_images, talk, turn, write

from llava_uhd.data import files as files_module
from llava_uhd.data.reading import read_records
from llava_uhd.data.records import Records
from llava_uhd.data.rows import parse_row, place_marker
from llava_uhd.errors import UserError


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("lines", [False, True])
def test_records_of_both_forms(folder: Path, tmp_path: Path, lines: bool) -> None:
    records = read_records(write(tmp_path / "data.json", ROWS, lines), folder)
    assert len(records) == 4 and records.num_left_out == 0
    assert [record.id for record in records] == ["one", "2", "three", "four"]
    assert records[2].images == (folder / "a.png", folder / "sub/b.png")
    assert [tuple(each) for each in records[2].turns] == [
        ("human", "<image> and <image>: which?"),
        ("gpt", "Both."),
        ("human", "Why?"),
        ("gpt", ""),
    ]
    assert [each.text for each in records[1].turns] == ["Hello.", "Hi."]
    assert records[-1] == records[3] and [each.id for each in records[1:3]] == ["2", "three"]
    assert records.where(3) == f"{tmp_path / 'data.json'}, record 3 (id 'four')"
    with pytest.raises(IndexError):
        records[4]
    # Words of all turns, as published, also of those that are left out.
    assert records.modality_lengths == [6, -4, 7, 4]
    assert records.lengths == [134, 4, 135, 132]
    assert list(pickle.loads(pickle.dumps(records))) == list(records)


VIDEO_ROWS: list[dict[str, Any]] = [
    {"id": "film", "video": "v.mp4", "conversations": talk("<image>\nWhat happens?")},
    {"id": "two", "videos": ["v.mp4", "frames"], "conversations": talk("<video> or <video>?")},
    {"id": "mixed", "image": "a.png", "video": "v.mp4",
     "conversations": [*talk("<video> Like <image>?"), *talk("And now?")]},
    {"id": "pages", "image": "a.png", "conversations": talk("<image> Write <video> tags.")},
    {"id": "roles", "conversations": [{"role": "user", "content": "One two."},
                                      {"role": "assistant", "content": "Three."}]},
]  # fmt: skip


def test_videos_and_other_spellings(folder: Path, tmp_path: Path) -> None:
    films = tmp_path / "films"
    (films / "frames").mkdir(parents=True)
    (films / "v.mp4").write_bytes(b"x")
    file = write(tmp_path / "data.json", VIDEO_ROWS)
    records = read_records(file, folder, films)
    assert records[0].videos == (films / "v.mp4",) and records[0].images == ()
    assert records[0].turns[0].text == "<video>\nWhat happens?"
    assert records[1].videos == (films / "v.mp4", films / "frames")
    assert (records[2].images, records[2].videos) == ((folder / "a.png",), (films / "v.mp4",))
    assert records[3].videos == () and records[3].turns[0].text == "<image> Write <video> tags."
    assert [tuple(turn) for turn in records[4].turns] == [("human", "One two."), ("gpt", "Three.")]
    # Published: images count 128 words, videos make a record long but not a text.
    assert records.lengths == [5, 5, 137, 134, 3]
    assert records.modality_lengths == [5, 5, 9, 6, -3]
    assert pickle.loads(pickle.dumps(records))[1] == records[1]
    # Without a folder of their own videos lie beside the images.
    with pytest.raises(UserError, match="3 of 5 records name image or video files that are miss"):
        read_records(file, folder)
    with pytest.raises(UserError, match="has videos, but data.video_folder or data.image_folder"):
        read_records(write(tmp_path / "one.json", VIDEO_ROWS[:1]), None)


def test_folders_of_frames_stay_inside(folder: Path, tmp_path: Path) -> None:
    films = tmp_path / "films"
    (films / "frames").mkdir(parents=True)
    (films / "frames/1.png").write_bytes((folder / "a.png").read_bytes())
    rows = [{"video": "frames", "conversations": talk()}]
    file = write(tmp_path / "data.json", rows)
    assert len(read_records(file, None, films)) == 1
    (films / "frames/2.png").symlink_to(folder / "a.png")
    with pytest.raises(UserError, match=r"video path 'frames/2\.png' is refused: a link leads out"):
        read_records(file, None, films)
    assert len(read_records(file, None, films, follow_links=True)) == 1
    # An image is never a folder.
    rows = [{"image": "frames", "conversations": talk()}]
    with pytest.raises(UserError, match="frames is missing"):
        read_records(write(tmp_path / "data.json", rows), films)


def published_1_5(text: str) -> str:
    """What LLaVA-1.5 does to a turn."""
    if "<image>" in text:
        text = text.replace("<image>", "").strip()
        text = "<image>\n" + text
        text = text.strip()
    return text


def published_onevision(text: str) -> str:
    """What LLaVA-OneVision does to a turn."""
    if text.count("<image>") == 1 and not text.startswith("<image>"):
        text = text.replace("<image>", "").strip()
        text = "<image>\n" + text
        text = text.strip()
    return text.replace("QA_GT_caption_based_noisy", "")


TEXTS = (
    "What is it?\n<image>", "<image>", "<image>What?", "<image>\nWhat?", " a <image> b ",
    "<image> or <image>?", "Which, <image><image>", " text ", "QA_GT_caption_based_noisy <image> a",
    "<image>\nQA_GT_caption_based_noisy Why?",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_places_of_markers(text: str) -> None:
    assert place_marker(text, False) == text
    assert place_marker(text, "llava_1_5") == published_1_5(text)
    assert place_marker(text, "onevision") == published_onevision(text)
    moved = published_1_5(text) if text.count("<image>") == 1 else text
    assert place_marker(text, True) == moved
    film = text.replace("<image>", "<video>")
    assert place_marker(film, True, ["v.mp4"]) == moved.replace("<image>", "<video>")
    assert place_marker(film, True) == film, "a word like others"


def test_marker_rules_of_records() -> None:
    """Collapsed markers are counted as they are then; texts without pictures stay."""
    row = {"image": "a.png", "conversations": talk("<image> and <image>: same?")}
    with pytest.raises(UserError, match=r"1 image\(s\) but 2 <image>"):
        parse_row(row, True)
    parsed = parse_row(row, "llava_1_5")
    assert parsed.turns[0].text == "<image>\nand : same?"
    assert parsed.words == 6, "of the text as written"
    film = parse_row({"video": "v.mp4", "conversations": talk("What?<image>")}, "onevision")
    assert film.turns[0].text == "<video>\nWhat?"
    text = " QA_GT_caption_based_noisy "
    assert parse_row({"conversations": talk(text)}, "onevision").turns[0].text == text


def test_lengths_are_the_published_ones(golden: Path) -> None:
    source = golden / "llava_1_5/model"
    wanted = json.loads((source / "cases.json").read_text())["train"]
    records = read_records(source / wanted["data"], source / "images")
    assert records.lengths == wanted["lengths"]
    assert records.modality_lengths == wanted["modality_lengths"]


def test_several_files_and_long_lists(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": f"é{i}", "conversations": talk(f"[{{]}}\\ {i}", "x" * i)} for i in range(60)]
    monkeypatch.setattr(files_module, "CHUNK", 7)  # every item is cut at the end of a chunk
    first = write(tmp_path / "one.json", rows)
    second = write(tmp_path / "two.jsonl", rows[:3], lines=True)
    records = read_records([str(first), str(second)], None)
    assert len(records) == 63
    assert records[59].turns[1].text == "x" * 59
    assert records.where(61) == f"{second}, record 1 (id 'é1')"
    with pytest.raises(UserError, match=r"two.json, record 0: has images, but data.image_folder"):
        read_records([str(first), str(write(tmp_path / "two.json", ROWS))], None)


BAD: list[tuple[Any, str]] = [
    ({"conversations": talk("Hi.")} | {"image": "a.png"}, r"has 1 image\(s\) but 0 <image>"),
    ({"conversations": talk()}, r"has 0 image\(s\) but 1 <image> marker"),
    ({"image": "a.png", "conversations": talk("<image><image>")}, r"1 image\(s\) but 2 <image>"),
    ({"image": "a.png", "images": ["a.png"], "conversations": talk()}, "both 'image' and"),
    ({"image": 3, "conversations": talk()}, "'image' must be a path or a list"),
    ({"image": "", "conversations": talk()}, "'image' must be a path or a list"),
    ({"video": "a.mp4", "conversations": talk("Hi.")}, r"has 1 video\(s\) but 0 <video>"),
    ({"video": ["a", "b"], "conversations": talk()}, r"has 0 image\(s\) but 1 <image>"),
    ({"video": "a", "videos": ["a"], "conversations": talk()}, "both 'video' and 'videos'"),
    ({"video": "../a.mp4", "conversations": talk()}, "video path .* must stay inside"),
    ({"image": "a.png", "video": "a", "conversations": talk("<video>")}, r"1 image\(s\) but 0"),
    ({"conversations": [{"role": "user"}]}, "turn 0 must have"),
    ({"conversations": [{"role": "tool", "content": "a"}]}, "turn 0 is from 'tool'"),
    ({"conversations": [{"role": ["user"], "content": "a"}]}, "turn 0 is from"),
    ({"image": "/etc/passwd", "conversations": talk()}, "must stay inside"),
    ({"image": "../a.png", "conversations": talk()}, "must stay inside"),
    ({"image": "sub/../../a.png", "conversations": talk()}, "must stay inside"),
    ({"image": "C:\\a.png", "conversations": talk()}, "must stay inside"),
    ({"image": "sub\\..\\..\\a.png", "conversations": talk()}, "must stay inside"),
    ({"conversations": []}, "must be a list with at least one human and one gpt"),
    ({}, "must be a list with at least one human and one gpt"),
    ({"conversations": [turn("human", "Hi.")]}, "the conversation is empty"),
    ({"conversations": [turn("gpt", "Hi.")]}, "the conversation is empty"),
    ({"conversations": [*talk("a"), turn("gpt", "b")]}, "two gpt turns follow each other"),
    ({"conversations": [turn("system", "a"), *talk("a")]}, "turn 0 is from 'system'"),
    ({"conversations": [{"from": "human"}]}, "turn 0 must have 'from' and 'value'"),
    ({"conversations": [turn("human", 3)]}, "turn 0 must have"),  # type: ignore[arg-type]
    (["a"], "must be an object"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_wrong_records_are_named(row: Any, message: str, folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "data.json", [ROWS[0], row])
    with pytest.raises(UserError, match=f"(?s)1 of 2 records are wrong.*record 1: .*{message}"):
        read_records(file, folder)


def test_all_mistakes_are_collected(folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "data.json", [{"conversations": talk()}] * 25 + ROWS)
    with pytest.raises(UserError, match="25 of 29 records are wrong") as caught:
        read_records(file, folder)
    lines = str(caught.value).splitlines()
    assert len(lines) == 22 and lines[-1].strip() == "... and 5 more"
    assert "record 19: " in lines[20]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no records"),
        ("[]", "holds no records"),
        ("[{}", "not valid JSON at record 1"),
        ('[{"id": 1,}]', "not valid JSON at record 0"),
        ("[{} {}]", "no comma after record 0"),
        ("[{}] []", "goes on after the end"),
        ("{}\n{]", "line 2 is not valid JSON"),
        ("\x80", "not a UTF-8 text"),
    ],
)
def test_broken_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        read_records(file, None)


def test_missing_data_files_say_how_to_fetch_them(tmp_path: Path) -> None:
    for name, repository in (
        ("blip_laion_cc_sbu_558k.json", "liuhaotian/LLaVA-Pretrain"),
        ("llava_v1_5_mix665k.json", "liuhaotian/LLaVA-Instruct-150K"),
    ):
        with pytest.raises(UserError, match=f"hf download --repo-type dataset {repository}") as one:
            read_records(tmp_path / name, tmp_path)
        assert str(tmp_path / name) in str(one.value) and "\n" not in str(one.value)
    with pytest.raises(UserError, match="mine.json does not exist: data.path must name"):
        read_records(tmp_path / "mine.json", tmp_path)
    with pytest.raises(UserError, match="is a folder"):
        read_records(tmp_path, tmp_path)
    with pytest.raises(UserError, match="image folder .* does not exist"):
        read_records(write(tmp_path / "data.json", ROWS), tmp_path / "nowhere")


def test_missing_images(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*ROWS, *({"image": f"gone{i}.png", "conversations": talk()} for i in range(25))]
    file = write(tmp_path / "data.json", rows)
    with pytest.raises(
        UserError, match="25 of 29 records name image or video files that are miss"
    ) as one:
        read_records(file, folder)
    assert "gone19.png is missing" in str(one.value) and "gone20" not in str(one.value)
    assert len(read_records(file, folder, check_files=False)) == 29
    with pytest.raises(UserError, match="more than the allowed share of 0.5"):
        read_records(file, folder, missing="skip", max_missing=0.5)
    records = read_records(file, folder, missing="skip", max_missing=0.9)
    assert (len(records), records.num_left_out) == (4, 25)
    assert "25 records left out" in caplog.text


def test_links_must_not_lead_out(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (root / "real/a.png").write_bytes((folder / "a.png").read_bytes())
    (root / "inner.png").symlink_to(root / "real/a.png")
    (root / "outer.png").symlink_to(folder / "a.png")
    (root / "outside").symlink_to(folder)
    (root / "again").symlink_to(root)

    def read(image: str, **options: bool) -> Records:
        rows = [{"image": image, "conversations": talk()}]
        return read_records(write(tmp_path / "data.json", rows), root, **options)  # type: ignore[arg-type]

    for image in ("real/a.png", "inner.png", "again/real/a.png"):
        assert len(read(image)) == 1
    for image in ("outer.png", "outside/a.png"):
        with pytest.raises(UserError, match="a link leads out of .*data.follow_links"):
            read(image)
        assert len(read(image, follow_links=True)) == 1
