"""Conversions as a command; weights shard by shard; the layout that a model belongs to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_checkpoint import Parts, assert_same, save
from fixtures_llava import MISTRAL, NEXT, ONE_VIEW, QWEN2, QWEN3, SYSTEMS, make
from fixtures_tiny import LLAMA, tiny_parts
from safetensors import safe_open

from llava_uhd import convert
from llava_uhd.checkpoint.agreement import Agreement, compare_logits
from llava_uhd.checkpoint.export import ExportOptions, export_checkpoint
from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.published.families import own_layout
from llava_uhd.checkpoint.shards import parse_size, plan_shards, write_shards
from llava_uhd.checkpoint.weights import read_folder, weight_files
from llava_uhd.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
QUIET = ExportOptions(check=False)


# --- the command ----------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
    assert convert.main() == 0


def test_command_takes_the_folder_in_two_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = save(tmp_path / "ours", make())
    run(monkeypatch, ours, tmp_path / "first", "--to", "transformers")
    told = capsys.readouterr().out
    assert "checked: logits differ by" in told
    assert "(largest" in told and "float32; text, picture, two pictures)" in told
    assert f"{ours} -> {tmp_path / 'first'} (transformers)" in told
    run(monkeypatch, ours, "--to", "original", "--out", tmp_path / "second", "--no-check")
    told = capsys.readouterr().out
    assert "checked" not in told and "(llava_1_5)" in told
    for words in ((), (tmp_path / "third", "--out", tmp_path / "fourth")):
        with pytest.raises(UserError, match="name one folder to write"):
            run(monkeypatch, ours, *words, "--to", "transformers")


def test_half_precision_is_compared_after_rounding(tmp_path: Path) -> None:
    """What rounding to the new dtype changes is no difference between the layouts."""
    ours = save(tmp_path / "ours", make())
    done = export_checkpoint(
        ours, "transformers", tmp_path / "out", ExportOptions(dtype=torch.bfloat16)
    )
    assert done.agreement is not None and done.agreement.difference <= 1e-4
    state = read_folder(tmp_path / "out")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["torch_dtype"] == "bfloat16"


def test_agreement_counts_everything() -> None:
    same = {"a": torch.ones(2, 4), "b": torch.ones(1, 4)}
    more = {"a": torch.ones(2, 6), "b": torch.ones(1, 6)}
    found = compare_logits(same, more, torch.float32)
    assert found == Agreement(0.0, 1.0, torch.float32, ("a", "b")) and found.holds
    other = {**same, "b": torch.tensor([[1.0, 1.0, 1.0, 1.1]])}
    assert not compare_logits(same, other, torch.float32).holds
    lost = {**same, "b": torch.tensor([[1.0, 1.0, 1.0, torch.nan]])}
    assert not compare_logits(same, lost, torch.float32).holds
    with pytest.raises(UserError, match="'a' as other numbers of tokens"):
        compare_logits(same, {**same, "a": torch.ones(3, 4)}, torch.float32)


# --- the layout of its own ------------------------------------------------------------------------

UHD: dict[str, Any] = {"type": "spatial_resampler", "num_queries": 144}


@pytest.mark.parametrize(
    ("options", "slug"),
    [
        *((options, name) for name, options in SYSTEMS.items()),
        ({"text": MISTRAL}, "llava_1_5"),
        ({"text": LLAMA, "image": {**NEXT, "layout": "spatial"}}, "llava_next"),
        ({"text": QWEN2, "image": ONE_VIEW}, "llava_onevision"),
        ({"projector": UHD, "image": {"strategy": "slices"}}, "uhd_v1"),
        ({"projector": {**UHD, "num_queries": 64}, "image": {"strategy": "slices"}}, "uhd_v2"),
        ({"projector": UHD, "image": {"strategy": "slices"}, "text": QWEN2}, "uhd_v2"),
        ({"projector": UHD, "image": {"strategy": "slices", "layout": "rows"}}, "uhd_v2_old"),
        (
            {"projector": {"type": "hiwin", "scales": (1, 2)}, "image": {"strategy": "slices"}},
            "uhd_v2",
        ),
    ],
)
def test_a_model_belongs_to_one_system(options: dict[str, Any], slug: str) -> None:
    assert own_layout(make(**options)[0].config).slug == slug


def test_published_folders_stay_in_their_layout(golden: Path, tmp_path: Path) -> None:
    done = export_checkpoint(golden / "uhd_v1/tiny_checkpoint", "original", tmp_path / "out", QUIET)
    assert done.layout == "uhd_v1"


@pytest.mark.parametrize("target", ["transformers", "original"])
def test_videos_of_a_system_without_them_are_noted(target: str, tmp_path: Path) -> None:
    parts = make(video={"pool_stride": 2})
    done = export_checkpoint(save(tmp_path / "ours", parts), target, tmp_path / "out")
    assert done.notes[0] == "video.pool_stride is 2, the layout means 1"
    assert done.agreement is not None and "video" not in done.agreement.prompts


@pytest.mark.parametrize("name", SYSTEMS)
def test_original_layouts_come_back(name: str, tmp_path: Path) -> None:
    parts = make(**SYSTEMS[name])
    done = export_checkpoint(save(tmp_path / "ours", parts), name, tmp_path / "out")
    assert done.agreement is not None and done.agreement.difference == 0
    assert [note for note in done.notes if "tokenizer.model" not in note] == []
    model, processor = load_pretrained(tmp_path / "out")
    assert_same(parts[0], model)
    assert model.config.image == parts[0].config.image
    assert processor.template_name == parts[1].template_name


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("llava_1_5", {"image": NEXT}, r"has no tiles \(anyres\): write llava_next"),
        ("llava_next", {}, r"means tiles \(anyres\): write llava_1_5"),
        ("llava_1_5", {"text": QWEN2}, "no 'qwen2' language model, only llama, mistral"),
        ("llava_onevision", {}, "no 'llama' language model, only qwen2"),
        ("uhd_v2", {"text": MISTRAL}, "no 'mistral' language model"),
        ("llava_1_5", {"text": QWEN3}, "no 'qwen3' language model"),
        ("llava_1_5", {"projector": {"type": "pixel_unshuffle_mlp"}}, "not pixel_unshuffle_mlp"),
        ("llava_1_5", {"image": {"strategy": "slices"}}, "image.layout is slices; it means flat"),
        ("llava_1_5", {"image": {**ONE_VIEW, "strategy": "squeeze"}}, "strategy is squeeze; with"),
        ("llava_1_5", {"image": {**ONE_VIEW, "scale_resolution": 64}}, "is 64, .* means 38"),
    ],
)
def test_what_original_layouts_cannot_hold(
    target: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    ours = save(tmp_path / "ours", make(**options))
    with pytest.raises(UserError, match=message) as caught:
        export_checkpoint(ours, target, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


# --- shards ---------------------------------------------------------------------------------------


def test_sizes_and_plans() -> None:
    assert [parse_size(text) for text in ("5GB", "300 kb", "64MB", "12")] == [
        5 * 10**9, 300_000, 64 * 10**6, 12,
    ]  # fmt: skip
    for text in ("", "5 TB", "-1", "0KB", "1.5GB"):
        with pytest.raises(UserError, match="must read like 5GB"):
            parse_size(text)
    assert plan_shards({"a": 3, "b": 2, "c": 4}, 5) == [["a", "b"], ["c"]]
    # What is larger than a shard stands alone.
    assert plan_shards({"a": 1, "b": 9, "c": 1}, 5) == [["a"], ["b"], ["c"]]
    assert plan_shards({}, 5) == []


def test_shards_hold_everything_once(tmp_path: Path) -> None:
    weights = {f"w{number}": torch.full((10,), float(number)) for number in range(7)}
    expected = dict(weights)
    write_shards(tmp_path, weights, 100, lambda _, tensor: tensor.double())
    assert weights == {}, "the caller's references would keep all of them in memory"
    files = weight_files(tmp_path)
    assert len(files) == 4
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 80
    found = read_folder(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], each.double()) for key, each in expected.items())


MEASURED = """
import sys, threading, time
from pathlib import Path
import torch
from llava_uhd.checkpoint.export import ExportOptions, export_checkpoint

source, target, out, dtype = sys.argv[1:]
dtype = torch.float16 if dtype == "half" else None
peak, running = 0, True

def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1])

def watch():
    global peak
    while running:
        peak = max(peak, resident())
        time.sleep(0.0005)

# What the library imports at its first use is none of the conversion.
export_checkpoint(Path(source) / "small", target, Path(out) / "small", ExportOptions(check=False))
before = resident()
thread = threading.Thread(target=watch)
thread.start()
export_checkpoint(
    Path(source) / "large", target, Path(out) / "large",
    ExportOptions(check=False, max_shard="8MB", dtype=dtype),
)
running = False
thread.join()
print(before, peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize(
    ("target", "dtype"), [("transformers", "same"), ("original", "half"), ("llava_uhd", "same")]
)
def test_memory_holds_a_shard_not_the_model(target: str, dtype: str, tmp_path: Path) -> None:
    """A model of 150 MB in shards of 8 MB: the conversion never holds a third of it."""
    large = {**LLAMA, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12}
    for name, text in (("small", LLAMA), ("large", {**large, "num_attention_heads": 8})):
        model, processor = make(text=text)
        model.save_pretrained(tmp_path / name, max_shard_size="8MB")
        processor.save_pretrained(tmp_path / name)
    size = sum(file.stat().st_size for file in weight_files(tmp_path / "large"))
    assert size > 140 * 10**6 and len(weight_files(tmp_path / "large")) > 15
    del model, processor
    source = tmp_path
    if target == "llava_uhd":  # from a published folder
        for name in ("small", "large"):
            options = ExportOptions(check=False, max_shard="8MB")
            export_checkpoint(tmp_path / name, "transformers", tmp_path / "lib" / name, options)
        source = tmp_path / "lib"
    words = [sys.executable, "-c", MEASURED, source, target, tmp_path / "out", dtype]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        list(map(str, words)), env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    before, peak = (1024 * int(word) for word in done.stdout.split()[-2:])
    print(f"{target}: {size / 1e6:.0f} MB, {(peak - before) / 1e6:.0f} MB more while converting")
    assert peak - before < size / 3
    files = weight_files(tmp_path / "out/large")
    assert len(files) > 8
    with safe_open(files[0], framework="pt") as opened:
        kinds = {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
    assert kinds == {"F16" if dtype == "half" else "F32"}


def test_our_folder_is_the_one_of_the_library(tmp_path: Path) -> None:
    """Weights, configuration and generation settings as ``save_pretrained`` would write them."""
    parts: Parts = tiny_parts()
    save(tmp_path / "direct", parts)
    done = export_checkpoint(save(tmp_path / "ours", parts), "llava_uhd", tmp_path / "out")
    assert done.layout == "llava_uhd" and done.agreement is not None
    assert done.agreement.difference == 0
    first, second = read_folder(tmp_path / "direct"), read_folder(tmp_path / "out")
    assert first.keys() == second.keys()
    assert all(torch.equal(each, second[key]) for key, each in first.items())
    for name in ("config.json", "processor_config.json"):
        assert json.loads((tmp_path / "direct" / name).read_text()) == json.loads(
            (tmp_path / "out" / name).read_text()
        )
