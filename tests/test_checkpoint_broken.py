"""Broken and hostile checkpoint folders: one line that names what is wrong, nothing executed."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_checkpoint import assert_same, copy, make_base, save, split
from fixtures_tiny import tiny_parts
from safetensors.torch import load_file, save_file

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.parts import (
    read_projector,
    read_tower_config,
)
from llava_uhd.checkpoint.shapes import describe_checkpoint
from llava_uhd.checkpoint.weights import read_folder, read_tensors, weight_files
from llava_uhd.errors import UserError


@pytest.fixture(scope="module")
def published(golden: Path) -> Path:
    return golden / "uhd_v1/tiny_checkpoint"


@pytest.fixture
def base(published: Path, tmp_path: Path) -> Path:
    return make_base(published, tmp_path / "base")


# --- broken ---------------------------------------------------------------------------------------


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return save(tmp_path / "ours", tiny_parts())


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


KEY = "projector.ln_post.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(KEY), rf"1 missing weights: {KEY}"),
        (lambda state: state.update(extra=torch.zeros(1)), "1 surplus weights: extra"),
        (
            lambda state: state.update({KEY: torch.zeros(3)}),
            rf"{KEY} is \(3,\), expected \(64,\)",
        ),
    ],
)
def test_wrong_weights_are_named(ours: Path, change: Any, message: str) -> None:
    rewrite(ours, change)
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(ours)
    assert str(ours) in str(caught.value) and "\n" not in str(caught.value)


def test_all_wrong_weights_in_one_message(ours: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state.pop(KEY)
        state["extra"] = torch.zeros(1)
        state["projector.query"] = torch.zeros(2, 2)

    rewrite(ours, change)
    with pytest.raises(UserError, match="1 missing.*1 surplus.*1 other shapes"):
        load_pretrained(ours)


def test_unknown_published_key_is_named(published: Path, tmp_path: Path) -> None:
    folder = copy(published, tmp_path / "copy")
    surplus = {"mystery.weight": torch.zeros(1), "riddle.bias": torch.zeros(1)}
    rewrite(folder, lambda state: state.update(surplus))
    message = r"2 weights are not part of the LLaVA-UHD v1 layout: mystery\.weight, riddle\.bias"
    with pytest.raises(UserError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(ours: Path, share: float) -> None:
    file = ours / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read as weights"):
        load_pretrained(ours)


@pytest.mark.parametrize("kind", ["zip", "old", "plain", "garbage", "list", "empty", "truncated"])
def test_binary_files_are_never_executed(ours: Path, kind: str, tmp_path: Path) -> None:
    import pickle

    victim = tmp_path / "victim"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {victim}",)

    file = ours / "pytorch_model.bin"
    state = load_file(ours / "model.safetensors")
    (ours / "model.safetensors").unlink()
    if kind in ("zip", "old"):
        torch.save({**state, KEY: Bomb()}, file, _use_new_zipfile_serialization=kind == "zip")
    elif kind == "list":
        torch.save([torch.zeros(1)], file)
    elif kind == "truncated":
        torch.save(state, file)
        file.write_bytes(file.read_bytes()[:5000])
    else:
        content = {
            "plain": pickle.dumps({KEY: Bomb()}),
            "garbage": random.Random(2).randbytes(999),
            "empty": b"",
        }
        file.write_bytes(content[kind])
    with pytest.raises(UserError, match=r"pytorch_model\.bin") as caught:
        load_pretrained(ours)
    assert "\n" not in str(caught.value)
    assert not victim.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_binary_files_fail_in_one_way(zipped: bool, tmp_path: Path) -> None:
    """Whatever a flipped byte does to the reader inside, the caller sees one kind of error."""
    file = tmp_path / "pytorch_model.bin"
    state = {"a": torch.zeros(30), "b": torch.ones(5)}
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 5])):
            damaged[draw.randrange(min(len(damaged), 400))] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            list(read_tensors(file))
        except UserError:
            refused += 1
    assert refused > 50


def test_bomb_in_a_projector_file(published: Path, base: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {victim}",)

    folder = tmp_path / "projector"
    folder.mkdir()
    shutil.copy(published / "config.json", folder)
    torch.save({"model.mm_projector.query": Bomb()}, folder / "mm_projector.bin")
    with pytest.raises(UserError, match=r"mm_projector\.bin cannot be read as weights"):
        load_pretrained(folder, base=base, vision_tower=published / "clip")
    assert not victim.exists()


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/outside.safetensors", "sub/x.bin"]
)
def test_index_that_points_outside(ours: Path, name: str) -> None:
    shutil.copy(ours / "model.safetensors", ours.parent / "outside.safetensors")
    os.symlink(ours / "model.safetensors", ours.parent / "link.safetensors")
    (ours / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {KEY: name}}))
    for given in (name, "../link.safetensors"):
        (ours / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {KEY: given}}))
        with pytest.raises(UserError, match="outside the folder"):
            load_pretrained(ours)


def test_linked_shards_are_followed(ours: Path) -> None:
    """The hub's cache keeps files elsewhere and links to them."""
    split(ours, binary=False)
    store = ours.parent / "blobs"
    store.mkdir()
    for file in weight_files(ours):
        file.rename(store / file.name)
        os.symlink(store / file.name, file)
    assert_same(tiny_parts()[0], load_pretrained(ours)[0])


@pytest.mark.parametrize("content", [{"weight_map": [1]}, {"weight_map": {KEY: 3}}, {}, {"a": 1}])
def test_malformed_index(ours: Path, content: Any) -> None:
    (ours / "model.safetensors").unlink()
    (ours / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        load_pretrained(ours)


def test_missing_shards_are_named(ours: Path) -> None:
    split(ours, binary=False)
    (ours / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"1 of 3 weight files.*model-00002-of-00003"):
        load_pretrained(ours)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\x01"])
def test_config_that_is_not_json(ours: Path, content: str) -> None:
    (ours / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json") as caught:
        load_pretrained(ours)
    assert "\n" not in str(caught.value)


def test_config_with_an_unknown_key(ours: Path) -> None:
    values = json.loads((ours / "config.json").read_text())
    values["image"]["max_slice"] = 3
    (ours / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"image\.max_slice.*did you mean 'max_slices'"):
        load_pretrained(ours)


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("text_config", {"hidden_size": "wide"}),
        ("text_config", {"model_type": "unheard_of"}),
        ("vision_config", {"model_type": None}),
        ("projector", [1]),
    ],
)
def test_config_with_impossible_values(ours: Path, part: str, values: Any) -> None:
    config = json.loads((ours / "config.json").read_text())
    config[part] = {**config[part], **values} if isinstance(values, dict) else values
    (ours / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"ours/config\.json") as caught:
        load_pretrained(ours)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values", [{"text_config": {"model_type": "unheard_of"}}, {"image": {"max_slice": 3}}]
)
def test_broken_config_wherever_it_is_read(ours: Path, values: dict[str, Any]) -> None:
    """A whole model serves as the source of a projector, and of shapes for the cost model."""
    config = tiny_parts()[0].config
    content = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps({**content, **values}))
    for read in (lambda: read_projector(ours, config), lambda: describe_checkpoint(ours)):
        with pytest.raises(UserError, match=r"ours/config\.json") as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "wide"},
        {"mm_vision_select_feature": "cls_patch"},
        {"mm_use_im_start_end": True},
        {"mm_vision_select_layer": "last"},
        {"mm_projector_type": ["adapt_spatial_resampler"]},
        {"architectures": 3, "model_type": "llava"},
        {"rope_scaling": [1]},
        {"mm_vision_tower": "./gone"},
    ],
)
def test_broken_published_config(published: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = copy(published, tmp_path / "copy", **changes)
    for read in (load_pretrained, describe_checkpoint):
        with pytest.raises(UserError, match=r"copy(/config\.json|: its vision tower)") as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def test_models_that_are_not_ours(ours: Path, tmp_path: Path) -> None:
    (ours / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="'bert'.*not a LLaVA-UHD model"):
        load_pretrained(ours)
    with pytest.raises(UserError, match=r"config\.json does not exist: name the folder of a whole"):
        load_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"vision tower .* has no config\.json: name a folder"):
        read_tower_config(tmp_path)
    with pytest.raises(UserError, match="is a file, expected a folder"):
        load_pretrained(ours / "config.json")


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json"])
def test_missing_text_files(ours: Path, name: str) -> None:
    (ours / name).unlink()
    with pytest.raises(UserError, match=str(ours)) as caught:
        load_pretrained(ours)
    assert "\n" not in str(caught.value)


def test_missing_weights(ours: Path) -> None:
    (ours / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pass base and vision_tower"):
        load_pretrained(ours)
    with pytest.raises(UserError, match="has no weights"):
        read_folder(ours)


@pytest.mark.parametrize("file", ["projector.safetensors", "mm_projector.bin"])
def test_damaged_projector(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"not tensors")
    with pytest.raises(UserError, match=rf"{file} cannot be read as weights"):
        read_projector(tmp_path, tiny_parts()[0].config)


def test_hub_names_without_a_network() -> None:
    with pytest.raises(UserError, match="model 'someone/some-model' is neither.*pass the folder"):
        load_pretrained("someone/some-model")
    with pytest.raises(UserError, match=r"model \./gone does not exist"):
        load_pretrained("./gone")
    with pytest.raises(UserError, match="hf download lmsys/vicuna-7b-v1.5 --local-dir"):
        load_pretrained("pretrained_models/vicuna-7b-v1.5")
