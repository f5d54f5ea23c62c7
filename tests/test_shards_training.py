"""Training on shards: the run on plain files, and the unbroken run."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures_runs import FROM_NOTHING, Train, assert_same_run, break_at, steps, weights

from llava_uhd.data.pack_shards import Packing, pack_shards

LONG = (*FROM_NOTHING, "--trainer.max_steps", "6", "--trainer.save_steps", "2",
        "--data.six_slice_probability", "0.5", "--data.embedded", "null")  # fmt: skip


@pytest.fixture(scope="module")
def shards(workplace: Path) -> Path:
    """The data of the debug recipe as shards of a few samples each."""
    data = workplace / "playground/data/debug"
    out = workplace / "shards"
    pack_shards(Packing([str(data / "finetune.json")], out, str(data / "images"), size=8_000))
    assert len(list(out.glob("*.tar"))) > 1
    return out


def test_training_on_shards_is_training_on_files(
    train: Train, workplace: Path, shards: Path
) -> None:
    data = workplace / "playground/data/debug"
    plain = [
        "--data.path",
        str(data / "finetune.json"),
        "--data.image_folder",
        str(data / "images"),
    ]
    first = train("debug/finetune", "out/plain", *LONG, *plain)
    assert_same_run(first, train("debug/finetune", "out/shards", *LONG, "--data.path", str(shards)))


@pytest.mark.parametrize("shuffle", ["global", "shards"])
def test_going_on_in_the_middle_of_shards(train: Train, shards: Path, shuffle: str) -> None:
    words = [*LONG, "--data.path", str(shards), "--data.shuffle", shuffle]
    words += ["--trainer.dataloader_num_workers", "1"]
    words += ["--trainer.group_by_modality_length", "false"]
    whole = train("debug/finetune", f"out/whole_{shuffle}", *words)
    output = f"out/broken_{shuffle}"
    for step in (3, 5):
        break_at(step, train, "debug/finetune", output, *words)
    assert_same_run(whole, train("debug/finetune", output, *words))
    other = whole.parent / "whole_global"
    if shuffle == "shards" and other.is_dir():
        assert steps(other) != steps(whole) and weights(other).keys() == weights(whole).keys()
