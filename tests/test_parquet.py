"""Parquet tables as published: texts up front, images when asked for."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures_runs import FROM_NOTHING, Train, assert_same_run
from llava_files import ROWS, draw_images, talk, write
from torch.utils.data import DataLoader

from llava_uhd.config.data import DataConfig
from llava_uhd.data import parquet as parquet_module
from llava_uhd.data.drawn import data_manifest
from llava_uhd.data.pack_shards import Packing, pack_shards
from llava_uhd.data.parquet import MAX_GROUPS, ParquetCell, count_table
from llava_uhd.data.reading import read_records
from llava_uhd.data.validate import Sampling, validate
from llava_uhd.errors import UserError
from llava_uhd.images.pixels import open_image
from llava_uhd.images.stored import StoredFile

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    return draw_images(root)


def embedded(folder: Path, name: str | None) -> dict[str, Any] | None:
    """A picture as the library of data sets writes it."""
    return None if name is None else {"bytes": (folder / name).read_bytes(), "path": name}


def table_of(path: Path, columns: dict[str, list[Any]], group: int = 2) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def published(tmp_path: Path, folder: Path, count: int = 9, group: int = 2) -> Path:
    """Columns as in LLaVA-OneVision's data; every third row is a text."""
    names = [None if i % 3 == 2 else ("a.png", "sub/b.png")[i % 2] for i in range(count)]
    columns = {
        "id": [f"r{i}" for i in range(count)],
        "image": [embedded(folder, name) for name in names],
        "conversations": [talk("Hi." if name is None else f"<image>\n{i}?") for i, name in
                          enumerate(names)],
        "data_source": ["here"] * count,
    }  # fmt: skip
    return table_of(tmp_path / "data.parquet", columns, group)


def read(file: Any) -> bytes:
    return file.open().read() if isinstance(file, StoredFile) else file.read_bytes()


def test_images_in_a_column(tmp_path: Path, folder: Path) -> None:
    table = published(tmp_path, folder)
    records = read_records(table, None)
    assert len(records) == count_table(table) == 9
    for number, record in enumerate(records):
        assert record.id == f"r{number}"
        if number % 3 == 2:
            assert record.images == () and record.turns[0].text == "Hi."
            continue
        (image,) = record.images
        name = ("a.png", "sub/b.png")[number % 2]
        assert isinstance(image, ParquetCell) and image.path == name
        assert read(image) == (folder / name).read_bytes()
        assert open_image(image).size == ((60, 40), (200, 120))[number % 2]
    assert records.where(4) == f"{table}, record 4 (id 'r4')"
    assert [block % 2**40 for block in records.blocks] == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert str(records[0].images[0]) == f"a.png in {table}"


def test_images_are_read_when_asked_for(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = published(tmp_path, folder, 40)
    asked: list[tuple[int, list[str]]] = []
    original = pq.ParquetFile.read_row_group

    def watched(self: Any, group: int, columns: list[str], **named: Any) -> Any:
        asked.append((group, columns))
        return original(self, group, columns=columns, **named)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watched)
    batches: list[list[str]] = []
    iterate = pq.ParquetFile.iter_batches

    def texts(self: Any, size: int, **named: Any) -> Any:
        batches.append(named["columns"])
        return iterate(self, size, **named)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", texts)
    records = read_records(table, None)
    assert not asked and not any("bytes" in leaf for leaf in batches[0])
    assert not any("data_source" in leaf for leaf in batches[0])
    parquet_module._group.cache_clear()
    for index in (0, 1, 12, 13, 0):
        open_image(records[index].images[0])
    assert asked == [(0, ["image"]), (6, ["image"])]
    for record in records:
        assert all(min(open_image(image).size) >= 40 for image in record.images)
    assert parquet_module._group.cache_info().currsize <= MAX_GROUPS


def test_other_columns(tmp_path: Path, folder: Path) -> None:
    """Lists of images, paths without bytes, conversations as a text, no ids, no names."""
    two = [embedded(folder, "a.png"), embedded(folder, "sub/b.png")]
    lists = {"images": [two, None, []],
             "conversations": [talk("<image> or <image>?"), talk("a"), talk("b")]}  # fmt: skip
    records = read_records(table_of(tmp_path / "lists.parquet", lists), None)
    assert [read(image) for image in records[0].images] == [each["bytes"] for each in two if each]
    assert [len(record.images) for record in records] == [2, 0, 0]
    paths = {"image": ["a.png", None], "conversations": [json.dumps(talk()), json.dumps(talk("a"))]}
    plain = table_of(tmp_path / "paths.parquet", paths)
    assert read_records(plain, folder)[0].images == (folder / "a.png",)
    with pytest.raises(UserError, match="has images, but data.image_folder is not set"):
        read_records(plain, None)
    hollow = pa.array(
        [{"bytes": None, "path": "a.png"}] * 2,
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pq.write_table(pa.table({"image": hollow, "conversations": [talk(), talk()]}),
                   tmp_path / "hollow.parquet")  # fmt: skip
    assert read_records(tmp_path / "hollow.parquet", folder)[1].images == (folder / "a.png",)
    nameless = {"image": [{"bytes": b"x", "path": None}], "conversations": [talk()]}
    (image,) = read_records(table_of(tmp_path / "none.parquet", nameless), None)[0].images
    assert read(image) == b"x" and image.name == "image-0-0-0"


def test_tables_that_cannot_be_read(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = published(tmp_path, folder).read_bytes()
    for name, content in (("cut", whole[:-40]), ("none", b"no table"), ("empty", b"")):
        file = tmp_path / f"{name}.parquet"
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.parquet is no parquet table, or is damaged"):
            read_records(file, None)
    texts = table_of(tmp_path / "texts.parquet", {"text": ["a"], "label": [1]})
    with pytest.raises(UserError, match=r"no column 'conversations' \(columns: text, label\)"):
        read_records(texts, None)
    bare = table_of(tmp_path / "bare.parquet", {"image": [b"x"], "conversations": [talk()]})
    with pytest.raises(UserError, match="column 'image' holds bare bytes"):
        read_records(bare, None)
    rows = {"id": ["x", "y"], "image": [embedded(folder, "a.png"), {"bytes": b"", "path": "e.png"}],
            "conversations": [talk("none"), talk()]}  # fmt: skip
    wrong = table_of(tmp_path / "wrong.parquet", rows)
    with pytest.raises(UserError, match=r"record 0: has 1 image\(s\) but 0 <image>"):
        read_records(wrong, None)
    report = validate(DataConfig(path=str(wrong)), None, Sampling(None))
    told = [(each.kind, each.record, each.id) for each in report.problems]
    assert told == [("count", 0, "x"), ("broken", 1, "y")]
    assert "e.png in" in report.problems[1].what and "is empty" in report.problems[1].what
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow .*--extras train,data"):
        read_records(tmp_path / "wrong.parquet", None)


def test_mixtures_of_tables(tmp_path: Path, folder: Path) -> None:
    table = published(tmp_path, folder)
    write(tmp_path / "plain.json", ROWS)
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(
        "datasets:\n  - {json_path: data.parquet, sampling_strategy: 'end:3'}\n"
        f"  - {{json_path: plain.json, image_folder: {folder}}}\n"
    )
    records = read_records(mixture, None)
    assert [record.id for record in records] == ["r6", "r7", "r8", "one", "2", "three", "four"]
    assert read(records[1].images[0]) == (folder / "sub/b.png").read_bytes()
    digest = data_manifest(records.drawn)["sha256"]
    again = read_records(mixture, None)
    assert data_manifest(again.drawn)["sha256"] == digest
    published(tmp_path, folder, 10)
    assert data_manifest(read_records(mixture, None).drawn)["sha256"] != digest
    # A folder stands for its tables.
    assert len(read_records(tmp_path, None)) == count_table(table)


def test_workers_read_tables(tmp_path: Path, folder: Path) -> None:
    """The reader is opened anew in each process: threads do not outlive a fork."""
    records = read_records(published(tmp_path, folder, 40), None)
    images = [record.images[0] for record in records if record.images]
    alone = [open_image(image).size for image in images]
    loader: Any = DataLoader(_Sizes(images), batch_size=None, num_workers=2, timeout=60)  # type: ignore[arg-type]
    assert [tuple(size) for size in loader] == alone


class _Sizes:
    def __init__(self, images: list[Any]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[int]:
        return list(open_image(io.BytesIO(read(self.images[index])).getvalue()).size)


def test_tables_become_shards(tmp_path: Path, folder: Path) -> None:
    table = published(tmp_path, folder)
    pack_shards(Packing([str(table)], tmp_path / "shards", size=20_000))
    for one, other in zip(read_records(table, None), read_records(tmp_path / "shards", None)):
        assert (one.id, one.turns) == (other.id, other.turns)
        assert [read(image) for image in one.images] == [read(image) for image in other.images]
        assert [image.name for image in one.images] == [image.name for image in other.images]


def test_training_on_a_table_is_training_on_files(train: Train, workplace: Path) -> None:
    data = workplace / "playground/data/debug"
    rows = json.loads((data / "finetune.json").read_text())
    columns = {
        "id": [row["id"] for row in rows],
        "image": [
            {"bytes": (data / "images" / row["image"]).read_bytes(), "path": row["image"]}
            if "image" in row
            else None
            for row in rows
        ],
        "conversations": [row["conversations"] for row in rows],
    }
    table = table_of(workplace / "train.parquet", columns, 5)
    words = [*FROM_NOTHING, "--data.embedded", "null", "--data.six_slice_probability", "0.5"]
    words += ["--trainer.dataloader_num_workers", "2"]
    plain = [
        "--data.path",
        str(data / "finetune.json"),
        "--data.image_folder",
        str(data / "images"),
    ]
    first = train("debug/finetune", "out/from_files", *words, *plain)
    assert_same_run(first, train("debug/finetune", "out/table", *words, "--data.path", str(table)))
