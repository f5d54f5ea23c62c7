"""Files of pre-trained upsamplers: ours, the published dictionary, and what must be refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_uhd.checkpoint.vdim import (
    VDIM_FILE,
    find_vdim,
    named_scale,
    read_vdim,
    stack_width,
    vdim_facts,
    write_published_vdim,
    write_vdim,
)
from llava_uhd.errors import UserError
from llava_uhd.vision.upsampler import UpsamplerStack

WIDTH = 6
FACTS = {"width": "6", "tower": "clip", "mean": "[0.5]", "std": "[0.5]"}
State = dict[str, torch.Tensor]


def make_stack(scale: int, width: int = WIDTH) -> State:
    generator = torch.Generator().manual_seed(scale)
    with torch.device("meta"):
        shapes = UpsamplerStack(width, scale).state_dict()
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in shapes.items()}


def assert_equal(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_round_trip_of_both_formats(scale: int, tmp_path: Path) -> None:
    stack = make_stack(scale)
    assert (named_scale(stack), stack_width(stack)) == (scale, WIDTH)
    facts = {**FACTS, "scale": str(scale)}
    write_vdim(tmp_path, stack, facts)
    write_published_vdim(tmp_path / "x.ckpt", stack, settings={"lr": 1e-3}, epoch=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [VDIM_FILE, "x.ckpt"]
    for path in (tmp_path, tmp_path / VDIM_FILE, tmp_path / "x.ckpt"):
        assert_equal(read_vdim(path, WIDTH, scale), stack)
    assert vdim_facts(tmp_path) == facts and vdim_facts(tmp_path / "x.ckpt") == {}
    module = UpsamplerStack(WIDTH, scale)
    module.load_state_dict(read_vdim(tmp_path, WIDTH, scale))


def lightning(stack: State) -> State:
    """Everything that the published training saves."""
    tower = {"0.vision_tower.weight": torch.zeros(2), "1.norm.weight": torch.ones(2)}
    return {
        **{f"model.{name}": tensor for name, tensor in tower.items()},
        **{f"validation_model.{name}": tensor for name, tensor in tower.items()},
        **{f"upsampler.{name}": tensor for name, tensor in stack.items()},
        "downsampler.attention_net.1.weight": torch.zeros(1, 2),
        "downsampler_2x.w": torch.zeros(2, 2),
        "scale_net.net.weight": torch.zeros(1),
        # Parts of the training whose layers carry the stack's own names.
        "scale_net_2x.up1.range_temp": torch.zeros(()),
        "downsampler.upsampler.up1.range_temp": torch.zeros(()),
        "linear_acc": torch.zeros(1),
        "linear_iou": torch.zeros(1),
    }


@pytest.mark.parametrize(
    "form", ["lightning", "state_dict", "plain", "wrapper", "projector", "safetensors", "old"]
)
def test_forms_that_are_understood(form: str, tmp_path: Path) -> None:
    stack = make_stack(4)
    state = lightning(stack)
    file = tmp_path / "clip-large-vdim.ckpt"
    if form == "lightning":
        others = {name: value for name, value in state.items() if name[:9] != "upsampler"}
        write_published_vdim(file, stack, others, {"n_jitters": 2, "model_type": "clip-large"})
    elif form == "state_dict":
        torch.save({"state_dict": state}, file)
    elif form == "plain":
        torch.save({**stack, "epoch": 3}, file)
    elif form == "wrapper":
        wrapped = {f"upsampler.{name}": tensor for name, tensor in stack.items()}
        torch.save({**wrapped, "model.1.norm.weight": torch.ones(2)}, file)
    elif form == "projector":
        prefix = "model.mm_projector.upsampler."
        inside = {f"{prefix}upsampler.{name}": tensor for name, tensor in stack.items()}
        dead = {f"{prefix}model.1.norm.weight": torch.ones(2)}
        torch.save({**inside, **dead, "model.mm_projector.proj": torch.ones(2)}, file)
    elif form == "safetensors":
        file = tmp_path / "other.safetensors"
        save_file({f"projector.upsampler.{k}": v for k, v in stack.items()}, file)
    else:
        torch.save({"state_dict": state}, file, _use_new_zipfile_serialization=False)
    assert_equal(read_vdim(file, WIDTH, 4), stack)
    if form != "safetensors":
        assert find_vdim(tmp_path) == file
        assert_equal(read_vdim(tmp_path, WIDTH, 4), stack)


def test_published_dictionary(tmp_path: Path) -> None:
    """What its readers look at: `state_dict`, from which only the stack is taken."""
    stack = make_stack(2)
    write_published_vdim(tmp_path / "x.ckpt", stack, {"scale_net.w": torch.ones(1)}, global_step=7)
    whole = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert whole["global_step"] == 7 and {"epoch", "hyper_parameters", "callbacks"} <= whole.keys()
    assert "scale_net.w" in whole["state_dict"]
    kept = {
        name.removeprefix("upsampler."): tensor
        for name, tensor in whole["state_dict"].items()
        if "scale_net" not in name and "downsampler" not in name
    }
    assert_equal(kept, stack)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("up2.range_temp"), r"1 missing weights: up2\.range_temp"),
        (
            lambda s: s.update({"up1.range_proj.0.bias": torch.zeros(3)}),
            r"up1\.range_proj\.0\.bias is \(3,\), expected \(32,\)",
        ),
        (lambda s: s.update({"up3.range_temp": torch.zeros(())}), "1 surplus weights: up3"),
    ],
)
def test_every_weight_must_fit(change: Any, message: str, tmp_path: Path) -> None:
    stack = make_stack(4)
    change(stack)
    write_published_vdim(tmp_path / "x.ckpt", stack)
    with pytest.raises(UserError, match=message) as caught:
        read_vdim(tmp_path / "x.ckpt", WIDTH, 4)
    assert "\n" not in str(caught.value) and "x.ckpt" in str(caught.value)


def test_another_stack_is_named(tmp_path: Path) -> None:
    write_published_vdim(tmp_path / "x.ckpt", make_stack(2, width=3))
    with pytest.raises(
        UserError, match=r"the 4x upsampler of width 6.*\(found a 2x .* width 3\)"
    ) as e:
        read_vdim(tmp_path / "x.ckpt", WIDTH, 4)
    assert str(e.value).endswith("Name a file that was made for this tower and these scales")
    torch.save({"state_dict": {"model.0.weight": torch.ones(1)}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="found no upsampler in it"):
        read_vdim(tmp_path / "x.ckpt", WIDTH, 4)


def test_foreign_objects_are_refused(tmp_path: Path) -> None:
    victim = tmp_path / "victim"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {victim}",)

    file = tmp_path / "x.ckpt"
    state = lightning(make_stack(4))
    for entry in ({"hyper_parameters": Bomb()}, {"state_dict": {**state, "upsampler.x": Bomb()}}):
        torch.save({"state_dict": state, **entry}, file)
        with pytest.raises(UserError, match=r"x\.ckpt cannot be read.*system.*never loaded"):
            read_vdim(file, WIDTH, 4)
    assert not victim.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04"])
def test_damaged_files(content: bytes, tmp_path: Path) -> None:
    for name in ("x.ckpt", "x.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} cannot be read as weights"):
            read_vdim(tmp_path / name, WIDTH, 4)


def test_other_contents(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="holds a list, expected weights by name"):
        read_vdim(tmp_path / "x.ckpt", WIDTH, 4)


def test_folders_without_or_with_too_many(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UserError, match=r"has no upsampler.*vdim_pretrain\.sh"):
            find_vdim(path)
    for name in ("a.ckpt", "b.ckpt"):
        write_published_vdim(tmp_path / name, make_stack(4))
    with pytest.raises(UserError, match=r"several upsampler files \(a\.ckpt, b\.ckpt\)"):
        find_vdim(tmp_path)


def test_metadata_must_be_true(tmp_path: Path) -> None:
    for wrong in ({**FACTS, "scale": "2"}, {**FACTS, "scale": "4", "width": "7"}, FACTS):
        with pytest.raises(ValueError, match=r"do not fit a stack of width and scale"):
            write_vdim(tmp_path, make_stack(4), wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["full_llama", "full_qwen2"])
def test_stack_inside_a_whole_model(name: str, golden: Path) -> None:
    """A finished model may lend its upsampler."""
    folder = golden / "uhd_v2" / name
    prefix = "model.mm_projector.upsampler.upsampler."
    stored = load_file(folder / "model.safetensors")
    wanted = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    assert_equal(read_vdim(folder, 16, 4), wanted)


@pytest.mark.parametrize(("name", "scale"), [("jbu_2x", 2), ("jbu_4x", 4), ("jbu_8x", 8)])
def test_published_stacks_fit(name: str, scale: int, golden: Path, tmp_path: Path) -> None:
    """The reference's own weights, in the file its training would write."""
    tensors = load_file(golden / f"uhd_v2/{name}.safetensors")
    weights = {key.removeprefix("w."): v for key, v in tensors.items() if key.startswith("w.")}
    state = {
        key if key.startswith("upsampler.") else f"upsampler.{key}": weights[key] for key in weights
    }
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    width = int(tensors["source"].shape[1])
    found = read_vdim(tmp_path / "x.ckpt", width, scale)
    assert len(found) == len(weights)
    assert all(torch.equal(found[key.removeprefix("upsampler.")], weights[key]) for key in weights)
