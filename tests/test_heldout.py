"""Samples that are held out: which, and that evaluating them leaves no trace in the training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_runs import FROM_NOTHING, Train, assert_same_run, break_at, run_here, steps
from llava_files import draw_images, talk, write
from safetensors.torch import load_file
from torch import nn

from llava_uhd.config.data import DataConfig
from llava_uhd.data.holdout import hold_out, open_split
from llava_uhd.data.reading import read_records
from llava_uhd.errors import UserError
from llava_uhd.train.heldout import undisturbed
from llava_uhd.train.heldout_page import ANSWERS_FILE, PAGE_FILE, SHOWN, page, read_answers
from llava_uhd.train.log import read_log


def rows(count: int, images: int | None = None) -> list[dict[str, Any]]:
    """Records, of so many different images."""
    if images is None:
        return [{"id": f"r{i}", "conversations": talk(f"Question {i}.")} for i in range(count)]
    return [
        {"id": f"r{i}", "image": f"{i % images}.png", "conversations": talk(f"<image> {i}?")}
        for i in range(count)
    ]


def ids(records: Any) -> list[str]:
    return [record.id for record in records]


def test_division(tmp_path: Path) -> None:
    records = read_records(write(tmp_path / "a.json", rows(200)), None)
    kept, held = hold_out(records, 0.1)
    assert len(held) == 20 and len(kept) == 180
    assert not set(ids(kept)) & set(ids(held))
    assert sorted([*ids(kept), *ids(held)]) == sorted(ids(records))
    assert ids(kept) == [name for name in ids(records) if name not in set(ids(held))]
    # More hold the fewer; numbers and shares agree; the order of the file has no say.
    assert set(ids(held)) < set(ids(hold_out(records, 60)[1]))
    assert ids(hold_out(records, 20)[1]) == ids(held)
    turned = read_records(write(tmp_path / "b.json", rows(200)[::-1]), None)
    assert set(ids(hold_out(turned, 20)[1])) == set(ids(held))
    assert ids(hold_out(records, 0.001)[1]) and len(hold_out(records, 0.001)[1]) == 1
    with pytest.raises(UserError, match="leaves nothing of 200 records to train on"):
        hold_out(records, 200)


def test_images_are_never_on_both_sides(tmp_path: Path) -> None:
    for name in range(10):
        (tmp_path / f"{name}.png").write_bytes(b"x")
    records = read_records(write(tmp_path / "a.json", rows(100, images=10)), tmp_path)
    kept, held = hold_out(records, 15)
    sides = [{str(record.images[0]) for record in side} for side in (kept, held)]
    assert not sides[0] & sides[1] and len(sides[1]) == 2 and len(held) == 20


def test_repeated_records_are_held_out_whole(tmp_path: Path) -> None:
    write(tmp_path / "a.json", rows(40))
    mixture = tmp_path / "mix.yaml"
    mixture.write_text("datasets: [{json_path: a.json, epochs: 2.5}]")
    records = read_records(mixture, None)
    assert len(records) == 100
    kept, held = hold_out(records, 0.25)
    assert len(held) == 10 and not set(ids(kept)) & set(ids(held))
    assert len(kept) in range(60, 90) and len(set(ids(kept))) == 30


def test_data_of_their_own(tmp_path: Path) -> None:
    draw_images(tmp_path)
    one = write(tmp_path / "a.json", rows(5))
    other = write(tmp_path / "b.json", [{"image": "a.png", "conversations": talk()}])
    config = DataConfig(path=str(one), holdout_path=str(other), image_folder=str(tmp_path))
    records, held = open_split(config)
    assert (len(records), len(held or [])) == (5, 1)
    assert open_split(DataConfig(path=str(one)))[1] is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"holdout": 1.5}, "a share below 1 or a whole number of samples, got 1.5"),
        ({"holdout": 0}, "a share below 1 or a whole number"),
        ({"holdout": 5, "holdout_path": "a"}, "exclude each other"),
        ({"holdout_samples": -1}, "holdout_samples must be at least 0"),
        ({"shuffle": "shards", "batching": "packed"}, "exclude each other"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(path="a.json", **values)


def test_nothing_is_disturbed() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Linear(2, 2)))
    model[1].eval()

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    wanted = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    with pytest.raises(ZeroDivisionError), undisturbed(model):
        assert not model.training and draw() == wanted
        raise ZeroDivisionError
    assert draw() == wanted
    assert [module.training for module in model.modules()] == [True, True, False, False]


# --- runs -----------------------------------------------------------------------------------------

WORDS = (
    *FROM_NOTHING, "--trainer.max_steps", "6", "--trainer.save_steps", "2", "--data.holdout", "0.2",
    "--data.six_slice_probability", "0.5", "--lora.r", "2", "--lora.dropout", "0.3",
)  # fmt: skip
OFTEN = ("--trainer.eval_steps", "2")


def evaluations(folder: Path) -> list[tuple[int, float]]:
    return [(e["step"], e["eval_loss"]) for e in read_log(folder) if "eval_loss" in e]


@pytest.fixture(scope="module")
def evaluated(workplace: Path) -> Path:
    return run_here(workplace, "debug/finetune", "out/evaluated", *WORDS, *OFTEN)


def test_evaluation_leaves_no_trace(train: Train, evaluated: Path) -> None:
    """Losses with dropout, random sizes and workers are equal to the last bit."""
    silent = train("debug/finetune", "out/silent", *WORDS, "--trainer.eval_strategy", "no")
    assert steps(silent) == steps(evaluated)
    assert [step for step, _ in evaluations(evaluated)] == [2, 4, 6]
    assert not evaluations(silent) and not (silent / ANSWERS_FILE).exists()
    for name in ("adapter_model.safetensors", "non_lora_trainables.safetensors"):
        one, other = load_file(silent / name), load_file(evaluated / name)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_the_loss_is_that_of_learned_tokens(train: Train, evaluated: Path) -> None:
    """Neither the size of the batches nor workers change it."""
    words = [*WORDS, *OFTEN, "--trainer.per_device_eval_batch_size", "1"]
    alone = train("debug/finetune", "out/alone", *words, "--trainer.dataloader_num_workers", "1")
    for (_, one), (_, other) in zip(evaluations(evaluated), evaluations(alone), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    losses = [loss for _, loss in evaluations(evaluated)]
    assert losses[-1] < losses[0], "what is learned helps with what is not"


def test_answers_are_shown(evaluated: Path) -> None:
    entries = read_answers(evaluated)
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    assert [len(entry["answers"]) for entry in entries] == [4, 4, 4]
    answer = entries[-1]["answers"][0]
    assert set(answer) == {"where", "question", "expected", "generated"}
    text = (evaluated / PAGE_FILE).read_text(encoding="utf-8")
    assert text.count("data:image/jpeg;base64,") >= 4 and "step 6" in text
    manifest = json.loads((evaluated / "data_manifest.json").read_text())
    assert manifest["held_out"] == 4 and manifest["samples"] == 12


def test_going_on_repeats_no_evaluation(train: Train, evaluated: Path) -> None:
    for step in (3, 5):
        break_at(step, train, "debug/finetune", "out/again", *WORDS, *OFTEN)
    again = train("debug/finetune", "out/again", *WORDS, *OFTEN)
    assert steps(again) == steps(evaluated) and evaluations(again) == evaluations(evaluated)
    assert read_answers(again) == read_answers(evaluated)


def test_held_out_samples_of_a_run_stay(train: Train) -> None:
    break_at(3, train, "debug/finetune", "out/changed", *WORDS)
    with pytest.raises(UserError, match="data.holdout was 0.2, is 0.3"):
        train("debug/finetune", "out/changed", *WORDS, "--data.holdout", "0.3")


def test_other_runs(train: Train) -> None:
    """The first stage, packed rows, a number of samples, the default distance."""
    words = ["--data.holdout", "2", "--trainer.max_steps", "4"]
    first = train("debug/pretrain", "out/first", *words)
    assert [step for step, _ in evaluations(first)] == [1, 2, 3, 4]
    words += [*FROM_NOTHING, *OFTEN]
    rows = ["--data.batching", "packed", "--trainer.group_by_modality_length", "false"]
    packed = train("debug/finetune", "out/packed", *words, *rows)
    assert [step for step, _ in evaluations(packed)] == [2, 4]
    mixed = ["--data.embedded", "debug_mixed", "--model.video.max_frames", "2"]
    assert len(evaluations(train("debug/finetune", "out/films", *words, *mixed))) == 2
    silent = [*words, *mixed, "--trainer.eval_strategy", "no"]
    assert_same_run(train("debug/finetune", "out/no_films", *silent), first.parent / "films")


def test_evaluation_without_data(train: Train) -> None:
    with pytest.raises(UserError, match="eval_strategy is steps, but nothing is held out: set dat"):
        train("debug/finetune", "out/none", *FROM_NOTHING, "--trainer.eval_strategy", "steps")


def test_the_page_stays_small() -> None:
    entries = [
        {"step": n, "eval_loss": 1.0, "answers": [
            {"where": "a", "question": "<b>?", "expected": "x", "generated": f"answer {n}"}]}
        for n in range(100)
    ]  # fmt: skip
    text = page(entries, [["data:,"]])
    assert text.count("answer ") == SHOWN and "answer 99" in text and "answer 0<" in text
    assert "&lt;b&gt;?" in text and "<b>?" not in text
