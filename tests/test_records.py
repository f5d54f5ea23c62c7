from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from llava_files import ROWS, draw_images, talk, turn, write

from llava_uhd.data import records as records_module
from llava_uhd.data.records import Records, read_records
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
    monkeypatch.setattr(records_module, "CHUNK", 7)  # every item is cut at the end of a chunk
    first = write(tmp_path / "one.json", rows)
    second = write(tmp_path / "two.jsonl", rows[:3], lines=True)
    records = read_records([str(first), str(second)], None)
    assert len(records) == 63
    assert records[59].turns[1].text == "x" * 59
    assert records.where(61) == f"{second}, record 1 (id 'é1')"
    with pytest.raises(UserError, match=r"two.json, record 0: has an image, but data.image_folder"):
        read_records([str(first), str(write(tmp_path / "two.json", ROWS))], None)


BAD: list[tuple[Any, str]] = [
    ({"conversations": talk("Hi.")} | {"image": "a.png"}, r"has 1 image\(s\) but 0 <image>"),
    ({"conversations": talk()}, r"has 0 image\(s\) but 1 <image> marker"),
    ({"image": "a.png", "conversations": talk("<image><image>")}, r"1 image\(s\) but 2 <image>"),
    ({"image": "a.png", "images": ["a.png"], "conversations": talk()}, "both 'image' and"),
    ({"image": 3, "conversations": talk()}, "'image' must be a path or a list"),
    ({"image": "", "conversations": talk()}, "'image' must be a path or a list"),
    ({"video": "a.mp4", "conversations": talk("Hi.")}, "has a video"),
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
    with pytest.raises(UserError, match="25 of 29 records name image files that are miss") as one:
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
