"""Mixtures: which records are drawn, against a slow reference; mistakes; what was drawn."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from llava_files import draw_images, talk, write

from llava_uhd.data import files as files_module
from llava_uhd.data import mixture as mixture_module
from llava_uhd.data import readers as readers_module
from llava_uhd.data.drawn import data_manifest
from llava_uhd.data.mixture import Source, draw_random, find_sources, parse_strategy
from llava_uhd.data.paths import expand_braces
from llava_uhd.data.reading import read_records
from llava_uhd.data.records import Records
from llava_uhd.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def rows(count: int, name: str = "r") -> list[dict[str, Any]]:
    return [{"id": f"{name}{i}", "conversations": talk(f"Question {i}.")} for i in range(count)]


def mixture(folder: Path, *entries: Any, **top: Any) -> str:
    path = folder / "mix.yaml"
    path.write_text(yaml.safe_dump({"datasets": list(entries), **top}), encoding="utf-8")
    return str(path)


def ids(records: Records) -> list[str]:
    return [record.id for record in records]


def slow_draw(kind: str, amount: str, total: int, seed: str) -> list[int]:
    """The published rule with lists; "random" as documented, by hand."""
    items = list(range(total))
    if kind == "all":
        return items
    if amount.endswith("%"):
        number = math.ceil(int(amount[:-1]) * total / 100)
    else:
        number = int(amount)
    if kind == "first":
        return items[:number]
    if kind == "end":
        return items[-number:]
    generator = random.Random(seed)
    keyed = [(generator.random(), index) for index in items]
    keyed.sort()
    return sorted(index for _, index in keyed[:number])


@given(
    kind=st.sampled_from(["all", "first", "end", "random"]),
    total=st.integers(1, 60),
    share=st.integers(1, 100),
    percent=st.booleans(),
    seed=st.integers(-3, 3),
)
def test_draws_are_those_of_the_slow_form(
    kind: str, total: int, share: int, percent: bool, seed: int
) -> None:
    amount = f"{share}%" if percent else str(min(share, total))
    strategy = "all" if kind == "all" else f"{kind}:{amount}"
    drawn = Source(Path("some/data.json"), strategy, seed).draw(total)
    assert list(drawn) == slow_draw(kind, amount, total, f"{seed} data.json")


@pytest.mark.parametrize(
    ("percent", "total", "number"),
    [(10, 41, 5), (10, 40, 4), (1, 1, 1), (100, 7, 7), (33, 100, 33), (50, 738590, 369295),
     (10, 738591, 73860), (7, 300, 21), (29, 100, 29)],
)  # fmt: skip
def test_percentages_are_rounded_up(percent: int, total: int, number: int) -> None:
    assert parse_strategy(f"first:{percent}%").count(total) == number


def test_random_draws() -> None:
    """Uniform, nested, and not those of Python's global generator."""
    random.seed(1)
    state = random.getstate()
    small, large = draw_random(30, 100, "0 a"), draw_random(60, 100, "0 a")
    assert random.getstate() == state
    assert len(set(small)) == 30 and set(small) < set(large)
    assert small != draw_random(30, 100, "1 a") != draw_random(30, 100, "0 b")
    counts = [0] * 20
    for seed in range(2000):
        for index in draw_random(5, 20, str(seed)):
            counts[index] += 1
    # Each is drawn with probability 1/4: 500 times, standard deviation 19.4.
    assert max(abs(count - 500) for count in counts) < 80


def test_records_of_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.json", rows(10, "a"))
    write(tmp_path / "b.jsonl", rows(41, "b"), lines=True)
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere/c.json", rows(3, "c"))
    monkeypatch.chdir(tmp_path / "elsewhere")  # c.json is not beside the mixture
    path = mixture(
        tmp_path,
        {"json_path": "a.json", "sampling_strategy": "end:2"},
        {"json_path": "b.jsonl", "sampling_strategy": "first:10%"},
        {"json_path": "c.json"},
        {"json_path": "a.json", "sampling_strategy": "random:30%", "seed": 5},
    )
    records = read_records(path, None)
    picks = slow_draw("random", "30%", 10, "5 a.json")
    expected = ["a8", "a9", "b0", "b1", "b2", "b3", "b4", "c0", "c1", "c2"]
    assert ids(records) == expected + [f"a{i}" for i in picks]
    assert len(picks) == 3
    assert records.where(1) == f"{tmp_path / 'a.json'}, record 9 (id 'a9')"
    assert records.where(9) == "c.json, record 2 (id 'c2')"
    assert records.where(10) == f"{tmp_path / 'a.json'}, record {picks[0]} (id 'a{picks[0]}')"
    assert [(each.total, each.drawn) for each in records.drawn] == [
        (10, 2), (41, 5), (3, 3), (10, 3),
    ]  # fmt: skip
    assert ids(read_records(path, None)) == ids(records)


def test_seeds(tmp_path: Path) -> None:
    write(tmp_path / "a.json", rows(50))
    entry = {"json_path": "a.json", "sampling_strategy": "random:20"}

    def drawn(**given: Any) -> list[str]:
        seed = given.pop("own", None)
        own = {} if seed is None else {"seed": seed}
        return ids(read_records(mixture(tmp_path, {**entry, **own}, **given), None))

    assert drawn() == drawn(seed=0) == drawn(seed=9, own=0)
    assert drawn(seed=9) == drawn(own=9) != drawn()


def test_braces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert expand_braces("d/p{a,b , c}.json") == ["d/pa.json", "d/pb.json", "d/pc.json"]
    assert expand_braces("{a,b}/{1,2}.json") == ["a/1.json", "a/2.json", "b/1.json", "b/2.json"]
    assert expand_braces("a.json") == ["a.json"] and expand_braces("a}.json") == ["a}.json"]
    for name in "abc":
        write(tmp_path / f"p{name}.json", rows(2, name))
    write(tmp_path / "q{a}.json", rows(1, "brace"))
    assert ids(read_records(str(tmp_path / "p{a,c}.json"), None)) == ["a0", "a1", "c0", "c1"]
    assert ids(read_records(str(tmp_path / "q{a}.json"), None)) == ["brace0"]
    entries = [
        {"json_path": "p{b,a}.json", "sampling_strategy": "first:1"},
        {"json_path": "q{a}.json"},
    ]
    # With data files beside it; relative paths of a recipe count from the working folder.
    both = [mixture(tmp_path, *entries), str(tmp_path / "pc.json")]
    assert ids(read_records(both, None)) == ["b0", "a0", "brace0", "c0", "c1"]
    with pytest.raises(UserError, match=r"pz\.json does not exist"):
        read_records(str(tmp_path / "p{a,z}.json"), None)


def test_folders_of_a_source(tmp_path: Path) -> None:
    for name in ("one", "two", "films"):
        (tmp_path / name).mkdir()
    draw_images(tmp_path / "one")
    draw_images(tmp_path / "two")
    (tmp_path / "films/v.mp4").write_bytes(b"x")
    (tmp_path / "one/v.mp4").write_bytes(b"x")
    row = {"image": "a.png", "conversations": talk()}
    film = {"video": "v.mp4", "conversations": talk()}
    write(tmp_path / "a.json", [row])
    write(tmp_path / "b.json", [row, film])
    path = mixture(
        tmp_path,
        {"json_path": "a.json"},
        {"json_path": "b.json", "image_folder": "two", "video_folder": "films"},
        {"json_path": "b.json"},
    )
    records = read_records(path, tmp_path / "one")
    files = [*(record.images or record.videos for record in records)]
    names = [each[0].relative_to(tmp_path).as_posix() for each in files]
    assert names == ["one/a.png", "two/a.png", "films/v.mp4", "one/a.png", "one/v.mp4"]
    assert records.roots(0).images is records.roots(3).images
    shutil.rmtree(tmp_path / "two")
    with pytest.raises(UserError, match="image folder .*two does not exist"):
        read_records(path, tmp_path / "one")


def test_repeated_and_weighted_sources(tmp_path: Path) -> None:
    write(tmp_path / "a.json", rows(30, "a"))
    write(tmp_path / "b.json", rows(10, "b"))

    def counts(*entries: dict[str, Any]) -> tuple[Records, dict[str, int]]:
        records = read_records(mixture(tmp_path, *entries), None)
        return records, dict(Counter(ids(records)))

    a, b = {"json_path": "a.json"}, {"json_path": "b.json"}
    records, found = counts({**a, "epochs": 0.5}, {**b, "epochs": 2.3})
    assert [each.per_epoch for each in records.drawn] == [15, 23]
    assert sum(name[0] == "a" for name in found) == 15 and max(found.values()) == 3
    assert sorted(number for name, number in found.items() if name[0] == "b") == [2] * 7 + [3] * 3
    assert ids(counts({**a, "epochs": 0.5}, {**b, "epochs": 2.3})[0]) == ids(records)
    # Every copy knows where it comes from.
    assert records.where(16).endswith(f"b.json, record 1 (id '{ids(records)[16]}')")
    assert len(records.lengths) == len(records.blocks) == len(records) == 38
    # Weights share out the forty records that there are.
    records, found = counts({**a, "weight": 1}, {**b, "weight": 3})
    assert [each.per_epoch for each in records.drawn] == [10, 30] and len(records) == 40
    assert all(found[f"b{i}"] == 3 for i in range(10))
    records, _ = counts({**a, "weight": 1, "sampling_strategy": "first:10"}, {**b, "weight": 1})
    assert [each.per_epoch for each in records.drawn] == [10, 10]
    manifest = data_manifest(records.drawn)
    assert manifest["samples"] == 20 and [s["samples"] for s in manifest["sources"]] == [10, 10]
    assert "samples" not in data_manifest(counts(a, b)[0].drawn)["sources"][0]
    assert counts(a, b)[0].digest() != counts(a, {**b, "epochs": 2})[0].digest()


def test_selections(tmp_path: Path) -> None:
    records = read_records(write(tmp_path / "a.json", rows(6)), None)
    taken = records.take([4, 1, 1])
    assert ids(taken) == ["r4", "r1", "r1"] and ids(taken.take([2, 0])) == ["r1", "r4"]
    assert taken.where(0).endswith("record 4 (id 'r4')") and len(records) == 6
    assert taken.id_of(1) == "r1" and taken.words(0) == records.words(4)
    with pytest.raises(IndexError):
        taken[3]
    assert ids(pickle.loads(pickle.dumps(taken))) == ids(taken)


def test_paths_of_many_files(tmp_path: Path) -> None:
    assert expand_braces("s-{08..10}.tar") == ["s-08.tar", "s-09.tar", "s-10.tar"]
    assert expand_braces("{3..1}") == ["3..1"] and expand_braces("{1..9999999999}") == [
        "1..9999999999"
    ]
    for number in range(3):
        write(tmp_path / f"p-{number}.json", rows(1, f"p{number}"))
    assert ids(read_records(str(tmp_path / "p-*.json"), None)) == ["p00", "p10", "p20"]
    assert ids(read_records(mixture(tmp_path, {"json_path": "p-[12].json"}), None)) == [
        *("p10", "p20")
    ]
    with pytest.raises(UserError, match=r"q-\*.json does not exist"):
        read_records(str(tmp_path / "q-*.json"), None)


BAD: list[tuple[Any, str]] = [
    ({"datasets": [], "seed": 1}, "'datasets' must be a list with at least one"),
    ({"data": []}, r"unknown key '.*mix\.yaml: data'; did you mean 'datasets'"),
    ({"datasets": ["a.json"]}, r"datasets\[0\] must be a mapping"),
    ({"datasets": [{"path": "a.json"}]}, r"unknown key '.*datasets\[0\]\.path'; did you mean 'js"),
    ({"datasets": [{"seed": 3}]}, r"datasets\[0\]\.json_path is missing"),
    ({"datasets": [{"json_path": ["a"]}]}, r"json_path must be a text"),
    ({"datasets": [{"json_path": "a.json", "seed": 1.5}]}, "seed must be a whole number, got 1.5"),
    ({"datasets": [{"json_path": "a.json"}], "seed": True}, "seed must be a whole number"),
    ({"datasets": [{"json_path": "b.json"}]}, r"json_path b\.json does not exist, neither in "),
    ({"datasets": [{"json_path": "p{a,b}.json"}]}, r"json_path pa\.json does not exist"),
    ({"datasets": [{"json_path": "mix.yaml"}]}, "a mixture cannot hold another one"),
    ({"datasets": [{"json_path": "llava_v1_5_mix665k.json"}]}, "hf download --repo-type dataset"),
    ({"datasets": [{"json_path": "a.json", "sampling_strategy": "frist:3"}]}, "mean 'first'"),
    ({"datasets": [{"json_path": "a.json", "sampling_strategy": "first"}]}, "must be first:N"),
    ({"datasets": [{"json_path": "a.json", "sampling_strategy": "first:0"}]}, "at least 1"),
    ({"datasets": [{"json_path": "a.json", "sampling_strategy": "end:0%"}]}, "at least 1"),
    ({"datasets": [{"json_path": "a.json", "sampling_strategy": "end:1.5%"}]}, "whole percentage"),
    ({"datasets": [{"json_path": "a.json", "sampling_strategy": "random:-1"}]}, "must be random:N"),
    ({"datasets": [{"json_path": "a.json", "sampling_strategy": "all:3"}]}, "all takes no number"),
    ({"datasets": [{"json_path": "a.json", "sampling_strategy": 3}]}, "must be a text"),
    ({"datasets": [{"json_path": "a.json", "sampling_strategy": "first:5"}]},
     r"a\.json\): sampling_strategy 'first:5' asks for 5 records, but the file has 4"),
    ({"datasets": [{"json_path": "a.json", "sampling_strategy": "random:101%"}]}, "asks for 5"),
    ({"datasets": [{"json_path": "empty.json", "sampling_strategy": "first:1"}]}, "no records"),
    ({"datasets": [{"json_path": "empty.json"}]}, "no records"),
    ({"datasets": [{"json_path": "a.json", "epochs": 0}]}, "epochs must be a number above 0"),
    ({"datasets": [{"json_path": "a.json", "weight": "much"}]}, "weight must be a number above 0"),
    ({"datasets": [{"json_path": "a.json", "weight": 1, "epochs": 2}]}, "exclude each other"),
    ({"datasets": [{"json_path": "a.json", "weight": 1}, {"json_path": "a.json"}]},
     r"datasets\[1\]\.weight is missing: either every source has one, or none"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), BAD)
def test_mistakes(values: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path / "a.json", rows(4))
    write(tmp_path / "empty.json", [])
    path = tmp_path / "mix.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        read_records(str(path), None)
    assert "mix.yaml" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"mixture .*gone\.yml does not exist"):
        find_sources([str(tmp_path / "gone.yml")])


def test_wrong_records_are_named_by_their_file(tmp_path: Path) -> None:
    """Only drawn records are looked at; files of one name in two folders are told apart."""
    bad = {"image": "a.png", "conversations": talk("none")}
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "d.json", [*rows(2), bad])
    entries = [{"json_path": "x/d.json", "sampling_strategy": "first:2"}, {"json_path": "y/d.json"}]
    with pytest.raises(UserError, match="1 of 5 records are wrong") as caught:
        read_records(mixture(tmp_path, *entries), None)
    assert f"{tmp_path / 'y/d.json'}, record 2: has 1 image(s)" in str(caught.value)


def test_a_huge_source_is_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One record at a time, and none behind the last that is drawn."""
    monkeypatch.setattr(files_module, "CHUNK", 512)
    write(tmp_path / "a.json", rows(400))
    seen: list[int] = []
    original = mixture_module.iterate_rows

    def watched(file: Path, bad: Any = None) -> Any:
        for index, row in original(file, bad):
            seen.append(index)
            yield index, row

    for module in (mixture_module, readers_module):
        monkeypatch.setattr(module, "iterate_rows", watched)
    entry = {"json_path": "a.json", "sampling_strategy": "first:3"}
    assert len(read_records(mixture(tmp_path, entry), None)) == 3
    # Counted once, then read as far as needed: the strategy is checked against the true number.
    assert seen[:400] == list(range(400)) and seen[400:] in ([0, 1, 2], [0, 1, 2, 3])
    seen.clear()
    assert len(read_records(mixture(tmp_path, {"json_path": "a.json"}), None)) == 400
    assert len(seen) == 400


def test_manifest(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    draw_images(images)
    lost = {"id": "lost", "image": "gone.png", "conversations": talk()}
    first = write(tmp_path / "a.json", [*rows(5, "é"), {"conversations": talk("No id.")}, lost])
    write(tmp_path / "b.json", rows(10, "b"))
    path = mixture(
        tmp_path,
        {"json_path": "a.json"},
        {"json_path": "b.json", "sampling_strategy": "random:3", "seed": 4},
    )
    records = read_records(path, images, missing="skip", max_missing=0.2)
    manifest = data_manifest(records.drawn)
    assert (manifest["samples"], manifest["left_out"]) == (len(records), 1) == (9, 1)
    one, two = manifest["sources"]
    assert one["file_sha256"] == hashlib.sha256(first.read_bytes()).hexdigest()
    names = ["é0", "é1", "é2", "é3", "é4", "", "lost"]
    lines = "".join(f"{index} {name}\n" for index, name in enumerate(names))
    assert one["ids_sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    picks = slow_draw("random", "3", 10, "4 b.json")
    lines = "".join(f"{index} b{index}\n" for index in picks)
    assert two["ids_sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    keys = ("sampling_strategy", "seed", "total", "drawn", "left_out")
    assert [one[key] for key in keys] == ["all", None, 7, 7, 1]
    assert [two[key] for key in keys] == ["random:3", 4, 10, 3, 0]
    again = read_records(path, images, missing="skip", max_missing=0.2)
    assert data_manifest(again.drawn) == json.loads(json.dumps(manifest))
    write(tmp_path / "b.json", rows(11, "b"))
    changed = read_records(path, images, missing="skip", max_missing=0.2)
    assert data_manifest(changed.drawn)["sha256"] != manifest["sha256"]


@pytest.mark.parametrize(
    "file", sorted((ROOT / "playground/mixtures").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_mixtures_can_be_read(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    entries = yaml.safe_load(file.read_text(encoding="utf-8"))["datasets"]
    for entry in entries:
        path = tmp_path / entry["json_path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, rows(7))
    records = read_records(str(file), None)
    assert len(records.drawn) == len(entries) and len(records) >= len(entries)
