"""The SigLIP tower: against transformers' own, from and to its folders, with its normalisation."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_tiny import LLAMA, VISION, picture, tiny_parts
from PIL import Image
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from transformers import (
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_uhd.checkpoint.assemble import assemble
from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.parts import read_tower, read_tower_config, tower_key
from llava_uhd.config.model import CLIP_MEAN, CLIP_STD, CompressionConfig, ImageConfig
from llava_uhd.config.training import ModelSection
from llava_uhd.data.demo_tokenizer import build_demo_tokenizer
from llava_uhd.errors import UserError
from llava_uhd.vision.towers import VisionTower, num_built_layers

PATCH = 14
HALF = (0.5, 0.5, 0.5)
SIGLIP: dict[str, Any] = {
    **{key: value for key, value in VISION.items() if key != "model_type"},
    "model_type": "siglip_vision_model",
}


def vision_config(layers: int = 3, **options: Any) -> SiglipVisionConfig:
    values = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        # As in the published tower, the patches do not fill the picture: 6 x 14 = 84.
        "image_size": 6 * PATCH + 5,
        "patch_size": PATCH,
    }
    return SiglipVisionConfig(**{**values, **options})


def library_tower(seed: int = 0, **options: Any) -> SiglipVisionModel:
    """Transformers' tower with weights large enough to disagree."""
    torch.manual_seed(seed)
    theirs = SiglipVisionModel(vision_config(**options)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return theirs


def our_tower(theirs: SiglipVisionModel, select_layer: int) -> VisionTower:
    """Ours with the same weights."""
    ours = VisionTower(theirs.config, select_layer).eval()
    state = {}
    for key, tensor in theirs.state_dict().items():
        name = tower_key(key.removeprefix("vision_model."), len(ours.layers))
        if name is not None:
            state[name] = tensor.clone()
    ours.load_state_dict(state)
    return ours


def views(grids: list[tuple[int, int]], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    patches = sum(rows * columns for rows, columns in grids)
    return torch.randn(patches, 3 * PATCH**2, generator=generator), torch.tensor(grids)


def as_image(patches: torch.Tensor, grid: tuple[int, int], edge: int = 0) -> torch.Tensor:
    """(rows * columns, 3 * p * p) to (1, 3, height + edge, width + edge); the edge is unused."""
    rows, columns = grid
    tiles = patches.reshape(rows, columns, 3, PATCH, PATCH).permute(2, 0, 3, 1, 4)
    image = tiles.reshape(1, 3, rows * PATCH, columns * PATCH)
    return torch.nn.functional.pad(image, (0, edge, 0, edge), value=7.0)


# --- features -------------------------------------------------------------------------------------


@pytest.mark.parametrize("select_layer", [-1, -2, -3, -4, 0, 2])
def test_square_view_equals_the_library_model(select_layer: int) -> None:
    theirs = library_tower()
    pixels, grids = views([(6, 6)])
    with torch.no_grad():
        wanted = theirs(as_image(pixels, (6, 6), edge=5), output_hidden_states=True).hidden_states
        found = our_tower(theirs, select_layer)(pixels, grids)
    assert len(wanted) == 4 and found.shape == (36, 32)
    torch.testing.assert_close(found, wanted[select_layer][0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("grid", [(4, 9), (12, 5), (7, 7), (1, 1)])
def test_other_sizes_equal_the_library_model(grid: tuple[int, int]) -> None:
    theirs = library_tower()
    pixels, grids = views([grid])
    with torch.no_grad():
        wanted = theirs(
            as_image(pixels, grid), output_hidden_states=True, interpolate_pos_encoding=True
        ).hidden_states[-2]
        found = our_tower(theirs, -2)(pixels, grids)
    torch.testing.assert_close(found, wanted[0], rtol=1e-5, atol=2e-5)


def test_packed_equals_one_by_one() -> None:
    tower = our_tower(library_tower(), -2)
    shapes = [(3, 4), (6, 6), (4, 3), (1, 1), (3, 4), (5, 9)]
    pixels, grids = views(shapes)
    parts = pixels.split([rows * columns for rows, columns in shapes])
    with torch.no_grad():
        packed = tower(pixels, grids)
        alone = torch.cat([tower(part, grid[None]) for part, grid in zip(parts, grids)])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_deleting_the_last_layer_is_select_layer_minus_two() -> None:
    """The published code deletes layer 27 and reads the last output, before the norm."""
    theirs = library_tower()
    pixels, grids = views([(6, 6), (2, 7)])
    shorter = SiglipVisionModel(vision_config(layers=2)).eval()
    shorter.load_state_dict(theirs.state_dict(), strict=False)
    with torch.no_grad():
        whole = our_tower(theirs, -2)(pixels, grids)
        cut = our_tower(shorter, -1)(pixels, grids)
    assert torch.equal(whole, cut)
    assert num_built_layers(27, -2) == num_built_layers(26, -1) == 26


def test_gradients_with_and_without_checkpointing() -> None:
    tower = our_tower(library_tower(), -2).train()
    pixels, grids = views([(3, 4), (2, 2), (4, 3)])
    gradients, calls = [], 0

    def again(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return checkpoint(*given, use_reentrant=False, **named)

    for kept in (True, False):
        for layer in tower.layers:
            layer.gradient_checkpointing = not kept
            layer._gradient_checkpointing_func = again
        tower.zero_grad()
        tower(pixels, grids).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in tower.named_parameters()})
    assert calls == len(tower.layers)
    assert gradients[0].keys() == {name for name, _ in tower.named_parameters()}
    for name, gradient in gradients[0].items():
        # Keys have no say in where softmax puts its weight if all of them move alike.
        assert float(gradient.abs().max()) > 0 or name.endswith("k_proj.bias"), name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-7, msg=name)


# --- folders --------------------------------------------------------------------------------------


def assert_same_features(folder: Path, theirs: SiglipVisionModel) -> None:
    """The tower of a folder gives the features of the library's model."""
    config = read_tower_config(folder)
    state = read_tower(folder, config, -2)
    assert all(key.startswith("vision_tower.") for key in state)
    tower = VisionTower(config, -2).eval()
    tower.load_state_dict({key.removeprefix("vision_tower."): each for key, each in state.items()})
    pixels, grids = views([(6, 6), (3, 8)])
    with torch.no_grad():
        assert torch.equal(tower(pixels, grids), our_tower(theirs, -2)(pixels, grids))


def test_reads_a_folder_of_the_tower_alone(tmp_path: Path) -> None:
    theirs = library_tower()
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == SIGLIP["model_type"]
    assert_same_features(tmp_path, theirs)


def test_reads_a_folder_of_the_whole_model(tmp_path: Path) -> None:
    theirs = library_tower()
    text = SiglipTextConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    config = SiglipConfig(text_config=text.to_dict(), vision_config=theirs.config.to_dict())
    whole = SiglipModel(config)
    whole.vision_model.load_state_dict(theirs.state_dict())
    whole.save_pretrained(tmp_path)
    assert_same_features(tmp_path, theirs)


def test_our_weights_make_a_library_tower(tmp_path: Path) -> None:
    """Back to the published form: without its last layer and head, under the library's names."""
    theirs = library_tower()
    ours = our_tower(theirs, -2)
    config = vision_config(layers=len(ours.layers), vision_use_head=False)
    state = {
        "vision_model." + (f"encoder.{key}" if key.startswith("layers.") else key): tensor
        for key, tensor in ours.state_dict().items()
    }
    state["vision_model.post_layernorm.weight"] = torch.ones(32)
    state["vision_model.post_layernorm.bias"] = torch.zeros(32)
    config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, report = SiglipVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    pixels, grids = views([(6, 6)])
    with torch.no_grad():
        states = again(as_image(pixels, (6, 6), edge=5), output_hidden_states=True).hidden_states
        torch.testing.assert_close(ours(pixels, grids), states[-1][0], rtol=1e-5, atol=2e-5)


def test_published_shape() -> None:
    from llava_uhd.checkpoint.shapes import KNOWN_TOWERS, known_shape

    config = known_shape("google/siglip-so400m-patch14-384", KNOWN_TOWERS, "vision tower")
    with torch.device("meta"):
        tower = VisionTower(config, -2)
    assert len(tower.layers) == 26 and tower.embeddings.class_embedding is None
    assert tower.embeddings.position_embedding.weight.shape == (27 * 27, 1152)
    assert tower.embeddings.patch_embedding.bias is not None
    layer = tower.layers[0]
    assert (layer.mlp.fc1.out_features, layer.self_attn.num_heads) == (4304, 16)
    assert layer.layer_norm1.eps == 1e-6 and config.hidden_act == "gelu_pytorch_tanh"


# --- in a model -----------------------------------------------------------------------------------


def test_save_and_load_a_model(tmp_path: Path) -> None:
    model, processor = tiny_parts(vision=SIGLIP)
    assert type(model.vision_tower.layers[0]).__name__ == "SiglipEncoderLayer"
    inputs = processor(text="USER: <image>\nWhat? <image>", images=[picture(96, 64), picture(9, 9)])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = load_pretrained(tmp_path)
    assert again.image_config.normalisation == (HALF, HALF)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_pixels_are_normalised_as_the_tower_expects() -> None:
    levels = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    _, processor = tiny_parts(vision=SIGLIP)
    inputs = processor(text="<image>", images=[Image.fromarray(levels)])
    grid = inputs["view_grids"].tolist()
    assert grid == [[4, 4]]
    tiles = inputs["pixel_values"].reshape(4, 4, 3, 8, 8).permute(2, 0, 3, 1, 4)
    wanted = torch.from_numpy(levels).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(tiles.reshape(3, 32, 32), wanted)


def section(folder: Path, **image: Any) -> ModelSection:
    return ModelSection(
        language_model={**LLAMA},
        vision_tower=str(folder),
        image=ImageConfig(**{"scale_resolution": 89, "patch_size": PATCH, **image}),
    )


def image_of(folder: Path, **image: Any) -> ImageConfig:
    """Image configuration of a model made of this tower."""
    made = assemble(
        section(folder, **image), CompressionConfig(), torch.float32, build_demo_tokenizer
    )
    assert made.model.config.image.normalisation == made.processor.image_config.normalisation
    return made.processor.image_config


def test_normalisation_travels_with_the_tower(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = library_tower()
    theirs.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert image_of(tmp_path).normalisation == (HALF, HALF)  # of the family
        file = tmp_path / "preprocessor_config.json"
        file.write_text(json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}))
        assert image_of(tmp_path).normalisation == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
        assert not caplog.messages
        own = image_of(tmp_path, mean=CLIP_MEAN, std=CLIP_STD, scale_resolution=42)
    assert own.normalisation == (CLIP_MEAN, CLIP_STD)
    assert len(caplog.messages) == 2
    assert "model.image.mean" in caplog.messages[0] and "0.4" in caplog.messages[0]
    assert "scale_resolution is 42, the vision tower was trained at 89" in caplog.messages[1]
    file.write_text(json.dumps({"image_mean": [0.5], "image_std": [0.5]}))
    with pytest.raises(UserError, match="3 numbers each"):
        image_of(tmp_path)


def test_clip_keeps_its_normalisation() -> None:
    model, processor = tiny_parts()
    assert processor.image_config.normalisation == (CLIP_MEAN, CLIP_STD)
    assert model.config.image.mean == CLIP_MEAN
    half = tiny_parts(image={"mean": HALF})[1].image_config
    assert half.normalisation == (HALF, CLIP_STD)
