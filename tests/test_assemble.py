"""Putting models together: pre-trained upsamplers, and recipes over whole checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_model import save_tiny
from fixtures_tiny import LLAMA, VISION

from llava_uhd.checkpoint.assemble import Assembled, assemble, check_parts
from llava_uhd.checkpoint.shapes import describe_recipe
from llava_uhd.checkpoint.vdim import write_vdim
from llava_uhd.config.model import CompressionConfig, ProjectorConfig
from llava_uhd.config.recipe import load_recipe
from llava_uhd.config.training import ModelSection, Recipe
from llava_uhd.data.demo_tokenizer import build_demo_tokenizer
from llava_uhd.errors import UserError
from llava_uhd.vision.upsampler import UpsamplerStack

HIWIN = {"type": "hiwin", "num_queries": 4, "scales": (1, 4)}


def put_together(section: ModelSection) -> Assembled:
    return assemble(section, CompressionConfig(), torch.float32, build_demo_tokenizer)


def new_model(projector: dict[str, Any] = HIWIN, **more: Any) -> ModelSection:
    """A tiny model that starts from nothing."""
    section = ModelSection(
        language_model=dict(LLAMA),
        vision_tower=dict(VISION),
        projector=ProjectorConfig(**projector),
        **more,
    )
    section.image.patch_size, section.image.scale_resolution = 8, 32
    return section


def stack_file(path: Path, width: int, scale: int = 4, seed: int = 7) -> dict[str, torch.Tensor]:
    """Writes an upsampler with random weights."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.rand(tensor.shape, generator=generator)
        for name, tensor in UpsamplerStack(width, scale).state_dict().items()
    }
    facts = {"width": str(width), "scale": str(scale), "tower": "t", "mean": "0", "std": "1"}
    write_vdim(path, state, facts)
    return state


def upsampler_of(made: Assembled) -> dict[str, torch.Tensor]:
    return made.model.projector.upsampler.state_dict()


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# --- upsampler_file -------------------------------------------------------------------------------


def test_a_new_projector_takes_a_trained_upsampler(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = stack_file(tmp_path / "vdim.safetensors", VISION["hidden_size"])
    section = new_model(upsampler_file=str(tmp_path / "vdim.safetensors"))
    check_parts(section)
    with caplog.at_level(logging.WARNING):
        made = put_together(section)
    assert not caplog.records
    assert_same(upsampler_of(made), state)
    assert made.model.projector.query_1.abs().sum() > 0, "the rest starts from initial values"


def test_without_one_a_line_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        put_together(new_model())
    told = [record.message for record in caplog.records]
    assert len(told) == 1 and "upsampler starts from initial values" in told[0]
    assert "scripts/vdim_pretrain.sh" in told[0] and "\n" not in told[0]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        put_together(new_model({"type": "spatial_resampler", "num_queries": 4}))
        put_together(new_model({**HIWIN, "scales": (1,)}))
    assert not caplog.records


def test_it_replaces_what_a_projector_or_checkpoint_holds(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", projector={**HIWIN, "scales": [1, 4]})
    state = stack_file(tmp_path / "vdim.safetensors", VISION["hidden_size"])
    given = {"upsampler_file": str(tmp_path / "vdim.safetensors")}
    from_file = put_together(new_model(projector_file=str(folder), **given))
    kept = put_together(new_model(projector_file=str(folder)))
    from_whole = put_together(ModelSection(checkpoint=str(folder), **given))
    for made in (from_file, from_whole):
        assert_same(upsampler_of(made), state)
        for name, tensor in kept.model.projector.state_dict().items():
            if not name.startswith("upsampler."):
                assert torch.equal(made.model.projector.state_dict()[name], tensor), name
    assert not torch.equal(upsampler_of(kept)["fixup_proj.1.weight"], state["fixup_proj.1.weight"])


def test_mistakes_are_found_up_front(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="upsampler_file gone does not exist: train one before"):
        check_parts(new_model(upsampler_file="gone"))
    stack_file(tmp_path / "wide.safetensors", 48)
    section = new_model(upsampler_file=str(tmp_path / "wide.safetensors"))
    with pytest.raises(UserError, match="48"):
        put_together(section)
    section.projector = ProjectorConfig(num_queries=4)
    with pytest.raises(UserError, match="reads scale 1 alone and has no upsampler"):
        put_together(section)


# --- a recipe over a checkpoint -------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A tiny model whose settings are not the defaults."""
    image = {"max_slices": 3, "bounded": False, "long_side": 64}
    return str(save_tiny(tmp_path / "model", image=image, projector={"train_positions": False}))


def over(checkpoint: str, *words: str, base: str = "uhd_v1/finetune_vicuna7b") -> Recipe:
    return load_recipe(base, ["--model.checkpoint", checkpoint, *words])


def settings(recipe: Recipe) -> tuple[Any, ...]:
    """What the model of a recipe ends up with."""
    config = put_together(recipe.model).model.config
    seen = describe_recipe(recipe)
    image, projector = config.image, config.projector
    assert (image.max_slices, image.bounded) == (seen.image.max_slices, seen.image.bounded)
    return image.max_slices, image.bounded, image.long_side, projector.train_positions


def test_a_checkpoint_keeps_what_the_recipe_does_not_set(checkpoint: str) -> None:
    recipe = over(checkpoint)
    assert settings(recipe) == (3, False, 64, False)
    # The resolved recipe says no more than the recipe did, and comes to the same.
    model = recipe.to_dict()["model"]
    assert model["image"] == {} and model["projector"] == {"train_positions": False}
    assert "select_layer" not in model
    assert settings(Recipe.from_dict(recipe.to_dict())) == (3, False, 64, False)


def test_values_can_be_set_back_to_their_defaults(checkpoint: str, tmp_path: Path) -> None:
    words = ("--model.image.max_slices", "7", "--model.image.bounded", "true")
    words += ("--model.image.long_side", "null", "--model.projector.train_positions", "true")
    recipe = over(checkpoint, *words)
    assert settings(recipe) == (7, True, None, True)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert settings(load_recipe(file)) == (7, True, None, True)
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        f"base: uhd_v1/finetune_vicuna7b\nmodel: {{checkpoint: {checkpoint}, image: "
        "{max_slices: 7}}\n"
    )
    assert settings(load_recipe(mine)) == (7, False, 64, False)


def test_bases_made_for_another_model_do_not_count(checkpoint: str) -> None:
    """Row layout, scales and slices of the recipe belong to the parts that the checkpoint took."""
    recipe = over(checkpoint, base="uhd_v2/pretrain_vicuna7b")
    assert recipe.model.upsampler_file is None
    assert settings(recipe) == (3, False, 64, True)
    with pytest.raises(UserError, match="model.projector.scales is .* was made with"):
        put_together(over(checkpoint, "--model.projector.scales", "[1, 4]").model)
    with pytest.raises(UserError, match="model.select_layer is -1, but checkpoint"):
        put_together(over(checkpoint, "--model.select_layer", "-1").model)


def test_sections_made_in_code_compare_with_defaults(checkpoint: str) -> None:
    section = ModelSection(checkpoint=checkpoint)
    section.image.max_slices = 5
    made = put_together(section)
    assert made.model.config.image.max_slices == 5
    assert made.model.config.image.bounded is False
