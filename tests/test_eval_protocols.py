"""Protocols: what the published systems did, in sizes, numbers and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_tables import small_choices
from fixtures_tiny import picture, tiny_parts

from llava_uhd.config.model import ImageConfig
from llava_uhd.errors import UserError
from llava_uhd.eval.__main__ import main
from llava_uhd.eval.protocols import PROTOCOLS, processor_for
from llava_uhd.eval.results import TaskResult, protocol
from llava_uhd.eval.task import Task
from llava_uhd.eval.tasks import TASKS, find_task
from llava_uhd.images.strategies import plan_image, prepared_size


@pytest.mark.parametrize("name", PROTOCOLS.names())
def test_every_named_task_exists(name: str) -> None:
    for task in PROTOCOLS.get(name).tasks:
        assert TASKS.get(task).name == task


@pytest.mark.parametrize(
    ("protocol", "task", "long_side", "slices", "beams", "tokens"),
    [
        ("uhd_v1", "gqa", 1024, 7, 3, 128),
        ("uhd_v1", "mme", 1024, 7, 5, 128),
        ("uhd_v1", "textvqa", 1024, 7, 3, 128),
        ("uhd_v1", "vizwiz", 1024, 7, 3, 128),
        ("uhd_v1", "vqav2", 1024, 7, 3, 128),
        ("uhd_v1", "scienceqa", 1024, 7, 3, 1024),
        ("uhd_v1", "pope", 1024, 7, 1, 128),
        ("uhd_v1", "mmbench", None, 7, 1, 1024),
        ("uhd_v1", "mmbench_cn", None, 7, 1, 1024),
        ("uhd_v2", "gqa", 1024, 9, 3, 128),
        ("uhd_v2", "mme", 1024, 9, 5, 128),  # the test for "mme" never holds
        ("uhd_v2", "textvqa", 1536, 9, 3, 128),
        ("uhd_v2", "textvqa_no_ocr", 1536, 9, 3, 128),  # the same folder, and so the same size
        ("uhd_v2", "vizwiz_val", 1024, 9, 3, 128),
        ("uhd_v2", "ai2d", None, 9, 1, 128),
        ("uhd_v2", "docvqa", 1024, 9, 1, 128),
        ("uhd_v2", "chartqa", 1024, 9, 1, 128),
        ("uhd_v2", "rec", 1024, 9, 3, 128),
        ("uhd_v2", "scienceqa", 1024, 9, 3, 1024),
        ("uhd_v2", "mmbench", None, 9, 1, 1024),
        ("uhd_v2", "ocrbench", 1024, 9, 3, 1024),
        ("uhd_v2", "mmmu", 1024, 9, 3, 1024),
    ],
)
def test_values_of_the_published_scripts(
    protocol: str, task: str, long_side: int | None, slices: int, beams: int, tokens: int
) -> None:
    known, own = PROTOCOLS.get(protocol), ImageConfig(max_slices=6, long_side=300)
    applied = known.apply(TASKS.get(task))
    image = known.images(task, own)
    found = (image.long_side, image.max_slices, applied.beams, applied.max_new_tokens)
    assert found == (long_side, slices, beams, tokens)
    assert not image.bounded and own.bounded and own.max_slices == 6


@pytest.mark.parametrize("name", ["llava", "llavolta"])
def test_llava_leaves_images_alone_and_is_greedy(name: str) -> None:
    known, own = PROTOCOLS.get(name), ImageConfig(strategy="pad", layout="flat")
    for task in known.tasks:
        assert known.images(task, own) == own and known.apply(TASKS.get(task)).beams == 1
    assert known.apply(TASKS.get("gqa")).max_new_tokens == 128
    assert known.apply(TASKS.get("scienceqa")).max_new_tokens == 1024


def test_ours_changes_nothing() -> None:
    ours, own = PROTOCOLS.get("ours"), ImageConfig()
    for name in TASKS.names():
        task = TASKS.get(name)
        assert vars(ours.apply(task)) == vars(task) and ours.images(name, own) == own
        assert ours.settings(task, own)["protocol"] == "ours"


def test_prompts_of_the_kit_belong_to_v2_and_to_the_settings() -> None:
    v2 = PROTOCOLS.get("uhd_v2")
    task = v2.apply(TASKS.get("mmmu"))
    assert v2.settings(task, ImageConfig())["prompt_style"] == "kit"
    assert PROTOCOLS.get("uhd_v1").apply(TASKS.get("mmmu")).style == "llava"  # type: ignore[attr-defined]
    assert TASKS.get("mmmu").style == "llava"  # type: ignore[attr-defined]
    assert "prompt_style" not in v2.settings(TASKS.get("gqa"), ImageConfig())


def test_what_a_system_did_not_measure_is_said() -> None:
    v1 = PROTOCOLS.get("uhd_v1")
    assert v1.settings(TASKS.get("docvqa"), ImageConfig())["protocol"] == (
        "uhd_v1 (not measured by it)"
    )
    assert v1.covers("gqa") and not v1.covers("docvqa") and PROTOCOLS.get("ours").covers("docvqa")


@pytest.mark.parametrize(
    ("size", "long_side", "expected"),
    [
        ((336, 336), 1024, (1024, 1024)),  # enlarged
        ((2000, 1000), 1024, (1024, 512)),
        ((1000, 2000), 1536, (768, 1536)),
        ((823, 823), 1024, (1023, 1024)),  # the double-precision product is one unit low
        ((640, 427), 1024, (1024, 683)),
        ((300, 200), None, (300, 200)),
    ],
)
def test_sizes_before_cutting(
    size: tuple[int, int], long_side: int | None, expected: tuple[int, int]
) -> None:
    assert prepared_size(ImageConfig(long_side=long_side), *size) == expected


def test_more_slices_and_larger_images_change_the_plan() -> None:
    own = ImageConfig()
    plans = {
        name: plan_image(PROTOCOLS.get(name).images("textvqa", own), 640, 480)
        for name in ("ours", "uhd_v1", "uhd_v2")
    }
    assert {name: plan.num_slices for name, plan in plans.items()} == {
        "ours": 4, "uhd_v1": 6, "uhd_v2": 9,
    }  # fmt: skip
    assert plans["uhd_v2"].image_size == (1536, 1152)


def test_processor_resizes_with_the_bicubic_filter() -> None:
    _, processor = tiny_parts()
    image = picture(50, 30, seed=3)
    wanted = processor_for(
        processor, ImageConfig(**{**vars(processor.image_config), "long_side": 120})
    )
    assert processor.image_config.long_side is None and wanted is not processor
    assert processor_for(processor, processor.image_config) is processor
    found = wanted(text="<image> a", images=[image])
    by_hand = processor(text="<image> a", images=[image.resize((120, 72), resample=3)])
    assert torch.equal(found["pixel_values"], by_hand["pixel_values"])
    assert found["input_ids"].tolist() == by_hand["input_ids"].tolist()
    assert len(found["view_grids"]) > len(processor(text="<image>", images=[image])["view_grids"])


def run(checkpoint: Path, root: Path, out: Path, *words: str) -> tuple[Any, Any]:
    """A run of `main` on one task; its settings and its result."""
    arguments = ["run", str(checkpoint), "--tasks", "realworldqa", "--data-root", str(root)]
    assert main([*arguments, "--output", str(out), "--batch-size", "2", *words]) == 0
    folder = out / "realworldqa"
    result = TaskResult(**json.loads((folder / "scores.json").read_text("utf-8")))
    return json.loads((folder / "settings.json").read_text("utf-8")), result


def test_runs_under_protocols(tiny_checkpoint: Path, tmp_path: Path) -> None:
    small_choices(tmp_path / "realworldqa/RealWorldQA.tsv")
    more = ("--max-new-tokens", "3", "--beams", "1")
    own, ours = run(tiny_checkpoint, tmp_path, tmp_path / "a", *more)
    other, v2 = run(tiny_checkpoint, tmp_path, tmp_path / "b", "--protocol", "uhd_v2", *more)
    assert own["hash"] != other["hash"]
    assert own["settings"]["image.long_side"] is None and protocol(ours) == "ours, beams 1"
    changed = {key for key, value in other["settings"].items() if own["settings"].get(key) != value}
    assert changed == {
        "protocol", "image.long_side", "image.max_slices", "image.bounded", "prompt_style",
        "questions",
    }  # fmt: skip
    assert other["settings"]["image.long_side"] == 1024 and protocol(v2) == "uhd_v2, beams 1"
    rows = [json.loads(line) for line in (tmp_path / "b/realworldqa/items.jsonl").open()]
    assert "Options:\nA. tea" in rows[0]["prompt"]
    assert "uhd_v2, beams 1" in (tmp_path / "b/results.md").read_text("utf-8")
    with pytest.raises(UserError, match=r"other settings \(.*image.long_side"):
        run(tiny_checkpoint, tmp_path, tmp_path / "a", "--protocol", "uhd_v1", *more)
    with pytest.raises(UserError, match="unknown protocol 'uhd_v3'"):
        run(tiny_checkpoint, tmp_path, tmp_path / "c", "--protocol", "uhd_v3")


def test_a_task_is_not_changed_by_protocols() -> None:
    task: Task = find_task("gqa")
    PROTOCOLS.get("uhd_v1").apply(task)
    assert task.beams == 1
