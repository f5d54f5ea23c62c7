"""Checkpoints on disk: whole or not there, never something between."""

from __future__ import annotations

import errno
import json
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from llava_uhd.checkpoint.streamed import save_streamed
from llava_uhd.errors import UserError
from llava_uhd.train import saving
from llava_uhd.train.guarded import disk_reason, told_of_the_disk
from llava_uhd.train.saving import (
    SEAL_FILE,
    UNFINISHED,
    last_whole,
    newest,
    problem,
    publish,
    publish_result,
    rotate,
    seal,
)

# --- one tensor after another ---------------------------------------------------------------------


def test_streamed_files_are_safetensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        "wide": torch.randn(3, 5, generator=generator, dtype=torch.float64),
        "turned": torch.randn(4, 6, generator=generator).T,
        "half": torch.randn(7, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "nothing": torch.zeros(0, 4),
        "whole": torch.arange(5),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "ä": torch.ones(2, dtype=torch.float16),
    }
    path = tmp_path / "a.safetensors"
    save_streamed(state, path, {"what": "a test"})
    found = load_file(path)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "what": "a test"}


def test_streamed_files_take_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Tensors that only exist while they are asked for, as those of a GPU exist on the host."""

    class Made(Mapping[str, torch.Tensor]):
        def __init__(self) -> None:
            self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
            self.most = 0

        def __getitem__(self, name: str) -> torch.Tensor:
            made = torch.full((100,), float(name))
            self.alive.add(made)
            self.most = max(self.most, len(self.alive))
            return made

        def __iter__(self) -> Iterator[str]:
            return iter([str(number) for number in range(20)])

        def __len__(self) -> int:
            return 20

    state = Made()
    save_streamed(state, tmp_path / "a.safetensors")
    assert state.most <= 2
    assert float(load_file(tmp_path / "a.safetensors")["17"][3]) == 17


# --- the seal -------------------------------------------------------------------------------------


def sealed(folder: Path, step: int) -> Path:
    """A small checkpoint."""
    source = folder / UNFINISHED / f"checkpoint-{step}"
    (source / "inner").mkdir(parents=True)
    (source / "weights").write_bytes(bytes(range(256)) * 8)
    (source / "inner/state").write_text("state")
    seal(source, step=step, ranks=1)
    target = folder / source.name
    publish(source, target)
    return target


def test_a_sealed_folder_is_whole(tmp_path: Path) -> None:
    folder = sealed(tmp_path, 3)
    assert problem(folder) is None
    facts = json.loads((folder / SEAL_FILE).read_text())
    assert (facts["step"], facts["ranks"]) == (3, 1)
    assert {name: each["bytes"] for name, each in facts["files"].items()} == {
        "weights": 2048,
        "inner/state": 5,
    }
    assert not any((tmp_path / UNFINISHED).iterdir())


HARMS = {
    "a bit": (lambda f: flip(f / "weights", 1000), "weights is not what was written"),
    "the end": (lambda f: cut(f / "weights", 2047), "weights has 2047 bytes, not the 2048"),
    "a file": (lambda f: (f / "inner/state").unlink(), "inner/state is missing"),
    "a folder for a file": (lambda f: (f / "inner/state").rename(f / "moved"), "inner/state is"),
    "the seal": (lambda f: (f / SEAL_FILE).unlink(), "it has no complete.json"),
    "half the seal": (lambda f: cut(f / SEAL_FILE, 40), "is not valid JSON"),
    "an empty seal": (lambda f: (f / SEAL_FILE).write_text("{}"), "files"),
}


def flip(path: Path, place: int) -> None:
    """Changes one bit."""
    values = bytearray(path.read_bytes())
    values[place] ^= 1
    path.write_bytes(values)


def cut(path: Path, size: int) -> None:
    """Keeps the beginning of a file."""
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_folder_is_told(tmp_path: Path, harm: str) -> None:
    folder = sealed(tmp_path, 3)
    harming, reason = HARMS[harm]
    harming(folder)
    found = problem(folder)
    assert found is not None and reason in found


def test_large_files_are_known_by_their_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a system crash leaves: a file of the right size whose end was never written."""
    monkeypatch.setattr(saving, "DIGESTED_WHOLE", 1000)
    monkeypatch.setattr(saving, "DIGESTED_ENDS", 100)
    folder = sealed(tmp_path, 1)
    for place, seen in ((0, True), (99, True), (1000, False), (1948, True), (2047, True)):
        flip(folder / "weights", place)
        assert (problem(folder) is not None) == seen, place
        flip(folder / "weights", place)
    assert problem(folder) is None


def test_the_newest_whole_one_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (2, 4, 10):
        sealed(tmp_path, step)
    half = tmp_path / UNFINISHED / "checkpoint-12"
    half.mkdir(parents=True)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole(tmp_path) == tmp_path / "checkpoint-10" == newest(tmp_path)
    assert not half.parent.exists()
    flip(tmp_path / "checkpoint-10/weights", 5)
    assert last_whole(tmp_path) == tmp_path / "checkpoint-4"
    said = caplog.text
    assert "checkpoint-10 cannot be used: weights is not what was written" in said
    assert "kept as unreadable-checkpoint-10" in said
    assert (tmp_path / "unreadable-checkpoint-10/weights").is_file()
    # The run writes it again, and again it is harmed.
    flip(sealed(tmp_path, 10) / "weights", 5)
    for step in (2, 4):
        cut(tmp_path / f"checkpoint-{step}/weights", 9)
    assert last_whole(tmp_path) is None
    assert (tmp_path / "unreadable-2-checkpoint-10").is_dir()


def test_the_oldest_leave(tmp_path: Path) -> None:
    def steps() -> list[int]:
        return [step for step, _ in saving.checkpoints(tmp_path)]

    for step in (2, 4, 10, 12):
        sealed(tmp_path, step)
    rotate(tmp_path, None)
    rotate(tmp_path, 4)
    assert steps() == [2, 4, 10, 12]
    rotate(tmp_path, 3)
    assert steps() == [4, 10, 12]
    rotate(tmp_path, 1, best=str(tmp_path / "checkpoint-4"))
    assert steps() == [4, 12] and not any((tmp_path / UNFINISHED).iterdir())
    rotate(tmp_path, 1)
    assert steps() == [12]


def test_a_kill_while_one_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (2, 4):
        sealed(tmp_path, step)

    def killed(path: Path, ignore_errors: bool) -> None:
        (path / "weights").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(saving.shutil, "rmtree", killed)
        rotate(tmp_path, 1)
    assert [path.name for _, path in saving.checkpoints(tmp_path)] == ["checkpoint-4"]
    assert last_whole(tmp_path) == tmp_path / "checkpoint-4"
    assert not (tmp_path / UNFINISHED).exists()


@pytest.mark.parametrize("moves", range(6))
def test_a_result_has_weights_only_with_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """Killed after so many files were moved."""
    names = ["config.json", "model-1.safetensors", "model-2.safetensors", "tokenizer.json",
             "model.safetensors.index.json"]  # fmt: skip
    source = tmp_path / UNFINISHED / "result"
    source.mkdir(parents=True)
    for name in names:
        (source / name).write_text(name)
    replace, done = Path.replace, []

    def counted(self: Path, target: Path) -> Path:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(target.name)
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", counted)
        try:
            publish_result(source, tmp_path)
            assert moves == len(names)
        except KeyboardInterrupt:
            assert moves < len(names)
    assert done == [names[0], names[3], names[1], names[2], names[4]][:moves]
    assert (moves == len(names)) == (not source.exists())


# --- what a disk refuses --------------------------------------------------------------------------


def test_reasons_of_disks(tmp_path: Path) -> None:
    inside, outside = str(tmp_path / "log.jsonl"), "/somewhere/else.jpg"
    told = {
        OSError(errno.ENOSPC, "?"): "No space left on device",
        OSError(errno.EROFS, "?", outside): "Read-only file system",
        OSError(errno.EACCES, "?", inside): "Permission denied",
        OSError(errno.EACCES, "?", outside): None,
        FileNotFoundError(errno.ENOENT, "?", outside): None,
        OSError("no number"): None,
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"): (
            "File too large"
        ),
        SafetensorError("Error while deserializing header"): None,
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 0"): (
            "the disk is full, or a file grew too large"
        ),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"): (
            "the disk is full, or a file grew too large"
        ),
        RuntimeError("CUDA out of memory"): None,
    }
    for error, reason in told.items():
        assert disk_reason(error, tmp_path) == reason, error


def test_a_refusal_is_one_line(tmp_path: Path) -> None:
    first = r"cannot be written \(No space.*GiB free\).*start again$"
    with pytest.raises(UserError, match=first), told_of_the_disk(tmp_path):
        raise OSError(errno.ENOSPC, "?")
    sealed(tmp_path, 8)
    file = str(tmp_path / "log.jsonl")
    second = r"log\.jsonl: Disk quota.*checkpoint-8 is whole"
    with pytest.raises(UserError, match=second) as caught, told_of_the_disk(tmp_path):
        raise OSError(errno.EDQUOT, "?", file)
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="something else"), told_of_the_disk(tmp_path):
        raise RuntimeError("something else")
