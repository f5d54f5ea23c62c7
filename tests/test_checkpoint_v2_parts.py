"""Published LLaVA-UHD v2 checkpoints in all their forms: masks, parts, projector files, damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_checkpoint import (
    V2_NAMES,
    V2_TOWER,
    Parts,
    assert_same,
    copy,
    disturb,
    logits,
    v2_folders,
)
from fixtures_tiny import picture
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.parts import read_projector
from llava_uhd.checkpoint.published import VISION_PREFIX
from llava_uhd.checkpoint.published.uhd_v2 import mask_to_scales
from llava_uhd.checkpoint.shapes import describe_checkpoint
from llava_uhd.checkpoint.vdim import write_published_vdim
from llava_uhd.errors import UserError


@pytest.fixture(scope="module")
def folders(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return v2_folders(golden / "uhd_v2", tmp_path_factory.mktemp("uhd_v2"))


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, Parts]:
    return {name: load_pretrained(folder) for name, folder in folders.items()}


def change_weights(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)
    save_file(change(state), folder / "model.safetensors", metadata={"format": "pt"})


def writable(published: Path, target: Path, *left_out: str, **changes: Any) -> Path:
    """A copy that may be changed, also where the original is read-only."""
    shutil.copytree(published, target, ignore=shutil.ignore_patterns("config.json", *left_out))
    for path in (target, *target.rglob("*")):
        path.chmod(0o755)
    shutil.copytree(published / V2_TOWER, target / V2_TOWER, dirs_exist_ok=True)
    values = json.loads((published / "config.json").read_text())
    values = {key: value for key, value in {**values, **changes}.items() if value != "absent"}
    (target / "config.json").write_text(json.dumps(values))
    return target


def test_default_mask_needs_the_middle_scale(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = writable(folders["full_llama"], tmp_path / "c", feature_scale_mask="absent")
    model, processor = load_pretrained(folder)
    assert model.config.projector.scales == (1, 2, 4)
    assert model.projector.features_2x_projector.weight.shape == (128, 16)
    assert bool(logits(model, processor).isfinite().all())


@pytest.mark.parametrize(("mask", "left_out"), [(1, "upsampler."), (3, "upsampler.up2")])
def test_smaller_masks(mask: int, left_out: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """The published code crashes with scale 1 alone; here it is a projector without upsampler."""
    folder = writable(folders["full_llama"], tmp_path / "c", feature_scale_mask=mask)
    if mask == 3:
        with pytest.raises(UserError, match=r"surplus weights: projector\.upsampler\.up2"):
            load_pretrained(folder)
    change_weights(folder, lambda state: {k: v for k, v in state.items() if left_out not in k})
    model, processor = load_pretrained(folder)
    assert model.config.projector.scales == mask_to_scales(mask)
    assert any("upsampler" in key for key in model.state_dict()) == (mask == 3)
    assert bool(logits(model, processor).isfinite().all())


def test_foreign_weights_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = writable(folders["full_llama"], tmp_path / "c")
    change_weights(folder, lambda state: {**state, "mystery.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"not part of the LLaVA-UHD v2 layout: mystery\.weight"):
        load_pretrained(folder)
    name = "model.mm_projector.cat_proj.bias"
    change_weights(
        folder, lambda state: {k: v for k, v in state.items() if k not in (name, "mystery.weight")}
    )
    with pytest.raises(UserError, match=r"1 missing weights: projector\.cat_proj\.bias"):
        load_pretrained(folder)


def test_tuned_tower_inside_is_preferred(
    folders: dict[str, Path], loaded: dict[str, Parts], tmp_path: Path
) -> None:
    """A tower folder with weights of its own does not replace what training made of them."""
    folder = writable(folders["full_llama"], tmp_path / "c")
    state = load_file(folder / "model.safetensors")
    tower = {
        "vision_model." + key.removeprefix(VISION_PREFIX): tensor
        for key, tensor in state.items()
        if key.startswith(VISION_PREFIX)
    }
    save_file(tower, folder / V2_TOWER / "model.safetensors", metadata={"format": "pt"})
    disturb(folder / V2_TOWER / "model.safetensors")
    assert_same(loaded["full_llama"][0], load_pretrained(folder)[0])
    other, _ = load_pretrained(folder, vision_tower=folder / V2_TOWER)
    name = "vision_tower.layers.0.mlp.fc1.weight"
    expected = loaded["full_llama"][0].state_dict()[name] + 1
    assert torch.allclose(other.state_dict()[name], expected, atol=1e-2)


@pytest.mark.parametrize("field", ["jbu_vdim", "vdim_ckpt", "jbu_ckpt"])
def test_recorded_upsampler_fills_a_missing_one(
    field: str, folders: dict[str, Path], loaded: dict[str, Parts], tmp_path: Path
) -> None:
    model, _ = loaded["full_llama"]
    folder = writable(folders["full_llama"], tmp_path / "c", **{field: "./clip-large-vdim.ckpt"})
    assert_same(model, load_pretrained(folder)[0])  # the model's own goes before it
    change_weights(
        folder, lambda state: {k: v for k, v in state.items() if ".upsampler.up" not in k}
    )
    with pytest.raises(UserError, match=r"holds no upsampler, and '\./clip-large-vdim\.ckpt'"):
        load_pretrained(folder)
    write_published_vdim(folder / "clip-large-vdim.ckpt", model.projector.upsampler.state_dict())
    assert_same(model, load_pretrained(folder)[0])


# --- v1 inside both dialects ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "layout"),
    [({"feature_mode": "uhd_v1"}, "rows"), ({"model_mode": "uhd_v1"}, "slices")],
)
def test_projector_of_v1(
    changes: dict[str, str], layout: str, golden: Path, tmp_path: Path
) -> None:
    source = golden / "uhd_v1/tiny_checkpoint"
    changes["mm_projector_type"] = "adapt_spatial_resampler_v1"
    folder = copy(source, tmp_path / "copy", "mm_projector.bin", **changes)
    (v1, plain), (ours, processor) = load_pretrained(source), load_pretrained(folder)
    assert_same(v1, ours)
    assert ours.config.image.layout == layout == processor.image_config.layout
    assert torch.equal(logits(v1, plain), logits(ours, processor))
    # Two slices: only here the layouts differ.
    first, second = (
        each(text="<image>", images=[picture(500, 300)])["input_ids"] for each in (plain, processor)
    )
    assert torch.equal(first, second) == (layout == "slices")
    assert describe_checkpoint(folder).projector == ours.config.projector


# --- the projector alone --------------------------------------------------------------------------


@pytest.fixture
def base(folders: dict[str, Path], loaded: dict[str, Parts], tmp_path: Path) -> Path:
    """The language model of the Llama checkpoints as a folder of its own."""
    model, _ = loaded["full_llama"]
    language = AutoModelForCausalLM.from_config(model.config.text_config)
    language.load_state_dict(model.language_model.state_dict())
    language.save_pretrained(tmp_path / "base")
    for file in folders["full_llama"].glob("*token*"):
        shutil.copy(file, tmp_path / "base")
    return tmp_path / "base"


def first_stage_folder(published: Path, target: Path) -> Path:
    """What a published first stage leaves: ``config.json`` and ``mm_projector.bin``."""
    state = load_file(published / "model.safetensors")
    target.mkdir()
    shutil.copy(published / "config.json", target)
    projector = {key: tensor for key, tensor in state.items() if "mm_projector." in key}
    torch.save(projector, target / "mm_projector.bin")
    return target


def test_projector_file_alone(
    folders: dict[str, Path], loaded: dict[str, Parts], base: Path, tmp_path: Path
) -> None:
    folder = first_stage_folder(folders["full_llama"], tmp_path / "stage1")
    with pytest.raises(UserError, match="holds only"):
        load_pretrained(folder, vision_tower=folders["full_llama"] / V2_TOWER)
    tower = tmp_path / "clip"
    shutil.copytree(folders["full_llama"] / V2_TOWER, tower)
    tower.chmod(0o755)
    state = load_file(folders["full_llama"] / "model.safetensors")
    vision = {
        "vision_model." + key.removeprefix(VISION_PREFIX): tensor
        for key, tensor in state.items()
        if key.startswith(VISION_PREFIX)
    }
    save_file(vision, tower / "model.safetensors", metadata={"format": "pt"})
    both = load_pretrained(folder, base=base, vision_tower=tower)
    assert_same(loaded["full_llama"][0], both[0])
    assert torch.equal(logits(*both), logits(*loaded["full_llama"]))


@pytest.mark.parametrize("name", V2_NAMES)
def test_projector_file_of_a_recipe(
    name: str, folders: dict[str, Path], loaded: dict[str, Parts], tmp_path: Path
) -> None:
    """``model.projector_file``: a first stage's output, or a whole published folder."""
    model, _ = loaded[name]
    expected = {f"projector.{key}": value for key, value in model.projector.state_dict().items()}
    folder = first_stage_folder(folders[name], tmp_path / "stage1")
    for path in (folder, folder / "mm_projector.bin", folders[name]):
        found = read_projector(path, model.config)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key].float(), expected[key]) for key in found)
