"""Workers of data loaders: nothing of them is left, and their errors are one line."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures_runs import FROM_NOTHING, ROOT, Train, start
from llava_files import draw_images, talk, write
from PIL import Image
from torch.utils.data import DataLoader

from llava_uhd.data.dataset import BrokenFileError, ConversationDataset
from llava_uhd.data.pack_shards import Packing, pack_shards
from llava_uhd.data.rows import RowError
from llava_uhd.errors import UserError
from llava_uhd.train.trainer import EpochToSampler

PROC = Path("/proc/self")
needs_proc = pytest.mark.skipif(not (PROC / "fd").is_dir(), reason="reads /proc")


def held() -> dict[str, int]:
    """What this process holds: open files, processes, shared memory."""
    gc.collect()
    maps = (PROC / "maps").read_text().splitlines()
    return {
        "files": len(os.listdir(PROC / "fd")),
        "processes": len(multiprocessing.active_children()),
        "shared": sum("/dev/shm/" in line or "/torch_" in line for line in maps),
    }


@needs_proc
@pytest.mark.parametrize("persistent", ["false", "true"])
@pytest.mark.parametrize("kind", ["files", "shards"])
def test_nothing_is_left_of_an_epoch(
    train: Train, workplace: Path, persistent: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, int]] = []
    original = EpochToSampler.on_epoch_begin

    def on_epoch_begin(self: EpochToSampler, *given: Any, **named: Any) -> None:
        seen.append(held())
        original(self, *given, **named)

    monkeypatch.setattr(EpochToSampler, "on_epoch_begin", on_epoch_begin)
    data = workplace / "playground/data/debug"
    path, images = data / "finetune.json", data / "images"
    if kind == "shards":
        path = workplace / "leak_shards"
        pack_shards(Packing([str(data / "finetune.json")], path, str(images), size=8_000))
    words = ["--trainer.num_train_epochs", "4", "--trainer.dataloader_num_workers", "2"]
    words += ["--trainer.dataloader_persistent_workers", persistent, "--data.embedded", "null"]
    words += ["--data.path", str(path), "--data.image_folder", str(images)]
    words += ["--trainer.max_steps", "-1", "--trainer.save_strategy", "no"]
    before = held()
    train("debug/finetune", f"out/leak_{kind}_{persistent}", *FROM_NOTHING, *words)
    assert len(seen) == 4
    # From the second epoch on everything that is opened once is open.
    assert seen[1] == seen[2] == seen[3]
    after = held()
    assert after["processes"] == before["processes"] == 0
    assert after["shared"] <= seen[0]["shared"]


def test_errors_of_workers_are_one_line(train: Train, tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    draw_images(root)
    # Its header is whole, so that nothing before the run notices.
    Image.radial_gradient("L").save(root / "cut.jpg")
    (root / "cut.jpg").write_bytes((root / "cut.jpg").read_bytes()[:2000])
    rows = [{"id": f"r{i}", "image": "a.png", "conversations": talk()} for i in range(8)]
    rows[5]["image"] = "cut.jpg"
    file = write(tmp_path / "data.json", rows)
    words = ["--data.embedded", "null", "--data.path", str(file), "--data.image_folder", str(root)]
    words += ["--trainer.dataloader_num_workers", "2", "--data.preview", "0"]
    words += ["--data.max_unlearned", "1", *FROM_NOTHING]
    with pytest.raises(UserError) as caught:
        train("debug/finetune", "out/one_line", *words)
    message = str(caught.value)
    assert message.startswith(f"{file}, record 5 (id 'r5'): image {root}/cut.jpg cannot be dec")
    assert "\n" not in message and message.count("record 5") == 1 and "Traceback" not in message


@pytest.mark.slow
def test_the_command_prints_the_line_once(workplace: Path, tmp_path: Path) -> None:
    draw_images(tmp_path)
    rows = [{"id": "bad", "image": "broken.png", "conversations": talk()}] * 4
    file = write(tmp_path / "data.json", rows)
    words = ["--data.embedded", "null", "--data.path", str(file), "--data.preview", "0"]
    words += ["--data.image_folder", str(tmp_path), "--trainer.dataloader_num_workers", "2"]
    words += ["--data.max_unlearned", "1", "--trainer.output_dir", str(tmp_path / "out")]
    process = start(workplace, "debug/finetune", *FROM_NOTHING, *words)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2 and errors.count("broken.png") == 1
    assert errors.strip().splitlines()[-1].startswith(f"error: {file}, record ")
    assert "Traceback" not in errors


class _Failing(ConversationDataset):
    def __init__(self, error: Exception) -> None:
        self.error = error
        self.records = self  # type: ignore[assignment]

    def __len__(self) -> int:
        return 1

    def where(self, index: int) -> str:
        return f"d.json, record {index} (id 'x')"

    def _sample(self, index: int) -> Any:
        raise self.error


@pytest.mark.parametrize("kind", [UserError, BrokenFileError])
def test_messages_come_back_as_they_were(kind: type[UserError]) -> None:
    loader: Any = DataLoader(_Failing(kind("a: b\n  c")), num_workers=1)
    with pytest.raises(kind) as caught:
        next(iter(loader))
    assert str(caught.value) == "a: b\n  c"


def test_mistakes_of_the_program_name_the_record() -> None:
    with pytest.raises(RuntimeError, match=r"^d.json, record 0 \(id 'x'\): KeyError: 'k'$"):
        _Failing(KeyError("k"))[0]
    loader: Any = DataLoader(_Failing(KeyError("k")), num_workers=1)
    with pytest.raises(RuntimeError, match=r"d.json, record 0 \(id 'x'\): KeyError: 'k'"):
        next(iter(loader))


def test_errors_survive_a_pipe() -> None:
    assert str(pickle.loads(pickle.dumps(RowError("a", "role")))) == "a"
    assert str(UserError("Caught a cold")) == "Caught a cold"


def _collect(queue: Any) -> None:
    gc.collect()
    queue.put("done")


def test_frames_can_be_collected_in_a_forked_process(tmp_path: Path) -> None:
    """A converter of frames with threads of its own would wait for them for ever."""
    pytest.importorskip("av")
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("nothing is forked here")
    from fixtures_video import write_video

    from llava_uhd.config.model import VideoConfig
    from llava_uhd.images.video import read_video

    film = write_video(tmp_path / "film.mp4", 24, 12)
    gc.collect()
    gc.freeze()  # so that the other process looks at little else
    gc.disable()
    try:
        for _ in range(4):
            read_video(film, VideoConfig())
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=_collect, args=(queue,))
        process.start()
        try:
            assert queue.get(timeout=30) == "done"
        finally:
            process.kill()
            process.join()
    finally:
        gc.enable()
        gc.unfreeze()


def test_a_process_that_leaves_ends_its_workers(tmp_path: Path) -> None:
    """Also those that an error has kept alive: they leave SIGTERM alone, and it would wait."""
    script = tmp_path / "leaves.py"
    script.write_text(
        "from torch.utils.data import DataLoader\n"
        "from llava_uhd.train.signals import QuietWorker\n"
        "loader = DataLoader(range(99), num_workers=2, worker_init_fn=QuietWorker(None))\n"
        "kept = iter(loader)\n"
        "next(kept)\n"
        "raise SystemExit(3)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert (ended.returncode, ended.stderr) == (3, "")
