"""Shards: what is packed is what was there, read in place; order, resume, mistakes, safety."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llava_files import ROWS, draw_images, talk, write
from torch.utils.data import DataLoader

from llava_uhd.data import __main__ as command
from llava_uhd.data import pack_shards as packing_module
from llava_uhd.data import shard_files
from llava_uhd.data.pack_shards import STATE_FILE, Packing, pack_shards
from llava_uhd.data.reading import read_records
from llava_uhd.data.sampler import BlockSampler
from llava_uhd.data.shard_files import INDEX, TarMember, ensure_index
from llava_uhd.errors import UserError
from llava_uhd.images.pixels import open_image
from llava_uhd.images.stored import StoredFile


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    return draw_images(root)


def many(count: int) -> list[dict[str, Any]]:
    return [{**ROWS[i % 4], "id": f"r{i}", "source": f"kept {i}"} for i in range(count)]


def packed(tmp_path: Path, folder: Path, count: int = 20, size: int = 15_000) -> Path:
    file = write(tmp_path / "data.json", many(count))
    out = tmp_path / "shards"
    pack_shards(Packing([str(file)], out, str(folder), size=size))
    return out


def read(file: Any) -> bytes:
    return file.open().read() if isinstance(file, StoredFile) else file.read_bytes()


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


def test_what_is_packed_is_what_was_there(tmp_path: Path, folder: Path) -> None:
    out = packed(tmp_path, folder)
    plain = read_records(tmp_path / "data.json", folder)
    shards = read_records(out, None)
    assert len(files(out)) > 3 and all(len(each) <= 30_000 for each in files(out).values())
    assert len(shards) == len(plain) == 20
    for one, other in zip(plain, shards, strict=True):
        assert (one.id, one.turns) == (other.id, other.turns)
        for image, member in zip(one.images, other.images, strict=True):
            assert isinstance(member, TarMember) and member.name == image.name
            assert read(member) == read(image)
            assert np.array_equal(open_image(member), open_image(image))
    assert shards.lengths == plain.lengths
    # Other keys of a record are kept, and the layout is that of WebDataset.
    with tarfile.open(out / "shard-000000.tar") as archive:
        names = archive.getnames()
        row = json.load(archive.extractfile("000000000.json"))  # type: ignore[arg-type]
    assert row == many(1)[0]
    assert names[:6] == [
        *("000000000.json", "000000000.png", "000000001.json", "000000002.json"),
        *("000000002.0.png", "000000002.1.png"),
    ]


def test_paths_of_shards(tmp_path: Path, folder: Path) -> None:
    out = packed(tmp_path, folder)
    last = len(files(out)) - 1
    wanted = [record.id for record in read_records(out, None)]
    for path in (f"{out}/*.tar", f"{out}/shard-{{000000..{last:06d}}}.tar"):
        assert [record.id for record in read_records(path, None)] == wanted
    mixture = tmp_path / "mix.yaml"
    mixture.write_text('datasets: [{json_path: "shards/*.tar", sampling_strategy: "first:2"}]')
    assert len(read_records(mixture, None)) == 2 * (last + 1)
    where = read_records(out, None).where(19)
    assert where.startswith(str(out)) and "(id 'r19')" in where


@pytest.mark.parametrize("at", [1, 2, 4])
def test_packing_goes_on(
    tmp_path: Path, folder: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files(packed(tmp_path, folder))
    out = tmp_path / "broken"
    options = Packing([str(tmp_path / "data.json")], out, str(folder), size=15_000)
    calls = 0
    original = packing_module._add

    def failing(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 9 * at:
            raise OSError(28, "No space left on device")
        original(*given)

    with monkeypatch.context() as patched:
        patched.setattr(packing_module, "_add", failing)
        with pytest.raises(UserError, match="No space left on device.*what is complete is kept"):
            pack_shards(options)
    before = files(out)
    assert before.items() <= whole.items() and len(before) < len(whole)
    assert not json.loads((out / STATE_FILE).read_text())["finished"]
    made = pack_shards(options)
    assert files(out) == whole and made.samples == 20
    assert pack_shards(options) == made and files(out) == whole
    write(tmp_path / "data.json", many(21))
    with pytest.raises(UserError, match="holds shards of other data"):
        pack_shards(options)
    (out / STATE_FILE).unlink()
    with pytest.raises(UserError, match="shards of another origin"):
        pack_shards(options)


def test_records_that_cannot_be_packed(tmp_path: Path, folder: Path) -> None:
    lost = {"id": "lost", "image": "gone.png", "conversations": talk()}
    file = write(tmp_path / "data.json", [*ROWS, lost, {"id": "e", "conversations": []}])
    options = Packing([str(file)], tmp_path / "out", str(folder))
    with pytest.raises(UserError, match=r"record 4 \(id 'lost'\): gone.png is missing.*--missing"):
        pack_shards(options)
    skipping = Packing([str(file)], tmp_path / "other", str(folder), missing="skip")
    assert (pack_shards(skipping).samples, pack_shards(skipping).left_out) == (4, 2)
    mixture = tmp_path / "mix.yaml"
    mixture.write_text("datasets: [{json_path: data.json, epochs: 2}]")
    with pytest.raises(UserError, match="weight and epochs are for training"):
        pack_shards(Packing([str(mixture)], tmp_path / "third", str(folder)))


def test_the_command_packs(
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write(tmp_path / "data.json", ROWS)
    words = ["data", "shard", str(file), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*words, "--image-folder", str(folder), "--size", "1MB"])
    assert command.main() == 0
    assert "4 samples in 1 shards" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*words, "--size", "big"])
    with pytest.raises(UserError, match="--size big must be a size"):
        command.main()


def test_the_index_follows_the_archive(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = packed(tmp_path, folder, 4, 10**9)
    shard, index = out / "shard-000000.tar", out / f"shard-000000.tar{INDEX}"
    records = read_records(shard, None)
    stamp = index.stat().st_mtime_ns
    assert ensure_index(shard) == index and index.stat().st_mtime_ns == stamp
    # Another time, another archive: the index is made anew.
    os.utime(shard, (1, 1))
    ensure_index(shard)
    assert json.loads(index.read_bytes().splitlines()[0])["mtime_ns"] == 10**9
    index.write_text('{"format": 1, "si')
    assert len(read_records(shard, None)) == 4
    # An archive that changes under a run is noticed when a member is read.
    member = records[0].images[0]
    content = bytearray(shard.read_bytes())
    place = member.offset - 512  # type: ignore[union-attr]
    content[place : place + 512] = bytes(512)
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"a.png in .*is not where the index tells"):
        member.open()  # type: ignore[union-attr]


def test_an_index_without_a_place(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that cannot be written: the index goes to the user's own."""
    out = packed(tmp_path, folder, 4, 10**9)
    shard = out / "shard-000000.tar"
    (out / f"shard-000000.tar{INDEX}").unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    original = shard_files.write_index

    def refusing(place: Path, *given: Any) -> None:
        if place.parent == out:
            raise PermissionError(13, "Read-only file system")
        original(place, *given)

    monkeypatch.setattr(shard_files, "write_index", refusing)
    assert len(read_records(shard, None)) == 4
    (kept,) = (tmp_path / "cache").rglob(f"*{INDEX}")
    monkeypatch.setattr(shard_files, "scan_shard", lambda shard: 1 / 0)
    assert ensure_index(shard) == kept


def archive(path: Path, *members: tuple[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w") as made:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                made.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return path


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def test_shards_of_others(tmp_path: Path, folder: Path) -> None:
    """Records without names of images, several folders, long names, endings in capitals."""
    picture = (folder / "a.png").read_bytes()
    row = json.dumps({"conversations": talk()}).encode()
    two = json.dumps({"conversations": talk("<image> or <image>?")}).encode()
    long = f"{'deep/' * 40}x"
    shard = archive(
        tmp_path / "a.tar",
        *(("one/0.PNG", picture), ("one/0.json", row)),
        *(("two/0.json", two), ("two/0.10.png", picture), ("two/0.9.png", picture + b" ")),
        *((f"{long}.json", row), (f"{long}.png", picture)),
    )
    records = read_records(shard, None)
    assert [str(each.images[0].path) for each in records] == [  # type: ignore[union-attr]
        *("one/0.png", "two/0.9.png", f"{long}.png")
    ]
    assert [len(read(image)) - len(picture) for image in records[1].images] == [1, 0]
    assert open_image(records[2].images[0]).size == (60, 40)


def test_unsafe_and_broken_archives(tmp_path: Path, folder: Path) -> None:
    picture = (folder / "a.png").read_bytes()
    row = json.dumps({"image": "a.png", "conversations": talk()}).encode()
    good = [("0.json", row), ("0.png", picture)]
    escaping = archive(tmp_path / "up.tar", ("../../0.json", row), ("../../0.png", picture))
    # A name is a label: nothing is written, nothing outside is read.
    assert read(read_records(escaping, None)[0].images[0]) == picture
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "up.tar", "up.tar.index"]
    linked = archive(
        tmp_path / "link.tar", ("0.json", row), ("0.png", link("0.png", "/etc/passwd"))
    )
    with pytest.raises(UserError, match="member '0.png' is a link or the like"):
        read_records(linked, None)
    whole = archive(tmp_path / "whole.tar", *good)
    for name, content, message in (
        ("cut.tar", whole.read_bytes()[:1600], "ends inside of member '0.png'|damaged"),
        ("zip.tar", b"PK" + bytes(2000), "no plain tar file"),
        ("hole.tar", _with_noise(whole.read_bytes()), "damaged at byte"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_records(tmp_path / name, None)
    packed_up = tmp_path / "gz.tar"
    with tarfile.open(packed_up, "w:gz") as made:
        made.add(whole)
    with pytest.raises(UserError, match="compressed archives must be unpacked"):
        read_records(packed_up, None)
    for number, (members, message) in enumerate((
        ([("0.png", picture)], r"record 0 \(0\): has 0 .json members"),
        ([("0.json", b"{"), ("0.png", picture)], "is not valid JSON"),
        ([("0.json", row)], "names 1 image.s., but its file holds 0"),
    )):  # fmt: skip
        with pytest.raises(UserError, match=message):
            read_records(archive(tmp_path / f"bad{number}.tar", *members), None)
    empty = read_records(archive(tmp_path / "e.tar", ("0.json", row), ("0.png", b"")), None)
    with pytest.raises(UserError, match=r"a.png in .*e.tar is empty"):
        open_image(empty[0].images[0])


def _with_noise(content: bytes) -> bytes:
    """Bytes that are no header where the archive should end."""
    end = content.rstrip(b"\0")
    place = -(-len(end) // 512) * 512
    return content[:place] + b"noise" * 300


def test_videos_in_shards(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from fixtures_video import write_video

    from llava_uhd.config.model import VideoConfig
    from llava_uhd.images.video import frame_size, frame_times, num_frames, read_video

    films = tmp_path / "films"
    films.mkdir()
    film = write_video(films / "v.mp4", 25, 10)
    write_video(films / "w.webm", 12, 4, codec="libvpx-vp9")
    rows = [
        {"video": name, "conversations": talk("<video>\nWhat?")} for name in ("v.mp4", "w.webm")
    ]
    file = write(tmp_path / "data.json", rows)
    pack_shards(Packing([str(file)], tmp_path / "out", str(films)))
    config = VideoConfig(max_frames=4)
    for name, record in zip(("v.mp4", "w.webm"), read_records(tmp_path / "out", None), strict=True):
        one, other = (read_video(each, config) for each in (films / name, record.videos[0]))
        assert one.times == other.times and one.duration == other.duration
        assert all(np.array_equal(a, b) for a, b in zip(one.frames, other.frames, strict=True))
        (member,) = record.videos
        assert num_frames(member, config) == len(one.frames)
        assert frame_size(member) == one.frames[0].size
        assert frame_times(member, config) == (one.times, one.duration)
    frames = films / "frames"
    frames.mkdir()
    (frames / "1.png").write_bytes(b"x")
    write(file, [{"video": "frames", "conversations": talk("<video>\nWhat?")}])
    with pytest.raises(UserError, match="is a folder of frames, which shards cannot hold"):
        pack_shards(Packing([str(file)], tmp_path / "more", str(films)))
    assert film.is_file()


def test_neighbours_stay_together() -> None:
    blocks = [number // 10 for number in range(100)]
    sampler = BlockSampler(blocks, seed=3, window=2)
    order = list(sampler)
    assert sorted(order) == list(range(100)) and order == list(sampler)
    for start in range(0, 100, 20):
        assert len({blocks[index] for index in order[start : start + 20]}) == 2
    sampler.set_epoch(1)
    assert list(sampler) != order
    assert order != list(BlockSampler(blocks, seed=4, window=2))
    # One window over everything mixes everything.
    assert len({blocks[index] for index in list(BlockSampler(blocks, window=10))[:20]}) > 5


def test_few_archives_stay_open(tmp_path: Path, folder: Path) -> None:
    out = packed(tmp_path, folder, 200, 1)
    assert len(files(out)) == 200
    records = read_records(out, None)
    shard_files._opened.cache_clear()
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    for record in records:
        for image in record.images:
            open_image(image)
    if before:
        assert len(os.listdir("/proc/self/fd")) - before <= shard_files.MAX_OPEN


class _Bytes(torch.utils.data.Dataset[int]):
    def __init__(self, records: Any) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> int:
        return sum(sum(read(image)) for image in self.records[index].images)


def test_workers_share_no_place(tmp_path: Path, folder: Path) -> None:
    """Forked processes read the same open archive at different places at the same time."""
    records = read_records(packed(tmp_path, folder, 60, 10**9), None)
    alone = [_Bytes(records)[index] for index in range(60)]
    loader: DataLoader[int] = DataLoader(_Bytes(records), batch_size=None, num_workers=2)
    assert [int(each) for each in loader] == alone
