"""The any-size tower against transformers' own, and packed against one by one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from llava_uhd.checkpoint.parts import tower_key
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.vision.attention import ViewGroups
from llava_uhd.vision.position import resample_positions
from llava_uhd.vision.towers import VisionTower, num_built_layers

PATCH = 14


def vision_config(layers: int = 3) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=6 * PATCH,
        patch_size=PATCH,
        attn_implementation="eager",
    )


def make_pair(select_layer: int = -2) -> tuple[VisionTower, CLIPVisionModel]:
    """Our tower with the weights of a transformers one."""
    torch.manual_seed(0)
    theirs = CLIPVisionModel(vision_config()).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = VisionTower(vision_config(), select_layer).eval()
    state = {}
    for key, tensor in theirs.state_dict().items():
        name = tower_key(key.removeprefix("vision_model."), len(ours.layers))
        if name is not None:
            state[name] = tensor.clone()
    ours.load_state_dict(state)
    return ours, theirs


@pytest.fixture
def tower() -> VisionTower:
    return make_pair()[0]


def views(grids: list[tuple[int, int]], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    patches = sum(rows * columns for rows, columns in grids)
    return torch.randn(patches, 3 * PATCH**2, generator=generator), torch.tensor(grids)


def as_image(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(rows * columns, 3 * p * p) to (1, 3, height, width)."""
    rows, columns = grid
    tiles = patches.reshape(rows, columns, 3, PATCH, PATCH).permute(2, 0, 3, 1, 4)
    return tiles.reshape(1, 3, rows * PATCH, columns * PATCH)


def one_by_one(tower: VisionTower, pixels: torch.Tensor, grids: torch.Tensor) -> Iterator:
    parts = pixels.split([rows * columns for rows, columns in grids.tolist()])
    for part, grid in zip(parts, grids):
        yield tower(part, grid[None])


@pytest.mark.parametrize("select_layer", [-1, -2, -3, -4, 0, 1, 2, 3])
def test_equals_transformers(select_layer: int) -> None:
    ours, theirs = make_pair(select_layer)
    grids = [(6, 6), (4, 5), (6, 6), (3, 9)]
    pixels, view_grids = views(grids)
    features = ours(pixels, view_grids)
    assert features.shape == (pixels.shape[0], 32)
    parts = [rows * columns for rows, columns in grids]
    for part, grid, found in zip(pixels.split(parts), grids, features.split(parts)):
        # The library resizes positions with its own code; the table of the grid is put in place.
        embeddings = getattr(theirs, "vision_model", theirs).embeddings
        weight = embeddings.position_embedding.weight.detach()
        rows = torch.cat([weight[:1], resample_positions(weight[1:], grid)])
        outputs = run_transformers(theirs, embeddings, as_image(part, grid), rows)
        torch.testing.assert_close(found, outputs[select_layer][0, 1:], rtol=1e-4, atol=1e-5)


def run_transformers(
    model: CLIPVisionModel, embeddings: torch.nn.Module, image: torch.Tensor, rows: torch.Tensor
) -> list[torch.Tensor]:
    """All hidden states of transformers' encoder over given positions, without gradients."""
    inner = getattr(model, "vision_model", model)
    with torch.no_grad():
        patches = embeddings.patch_embedding(image).flatten(2).transpose(1, 2)
        hidden = torch.cat([embeddings.class_embedding.expand(1, 1, -1), patches], dim=1) + rows
        hidden = inner.pre_layrnorm(hidden)
        states = [hidden]
        for layer in inner.encoder.layers:
            output = layer(hidden, attention_mask=None)
            hidden = output[0] if isinstance(output, tuple) else output
            states.append(hidden)
    return states


def test_square_view_equals_the_whole_library_model() -> None:
    ours, theirs = make_pair()
    pixels, grids = views([(6, 6)])
    with torch.no_grad():
        outputs = theirs(as_image(pixels, (6, 6)), output_hidden_states=True)
    torch.testing.assert_close(
        ours(pixels, grids), outputs.hidden_states[-2][0, 1:], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("grid", [(4, 9), (12, 5)])
def test_other_sizes_equal_the_whole_library_model(grid: tuple[int, int]) -> None:
    ours, theirs = make_pair()
    pixels, grids = views([grid])
    with torch.no_grad():
        outputs = theirs(
            as_image(pixels, grid), output_hidden_states=True, interpolate_pos_encoding=True
        )
    torch.testing.assert_close(
        ours(pixels, grids), outputs.hidden_states[-2][0, 1:], rtol=1e-4, atol=1e-5
    )


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=7))
def test_packed_equals_one_by_one(grids: list[tuple[int, int]]) -> None:
    tower = make_pair()[0]
    pixels, view_grids = views(grids)
    with torch.no_grad():
        packed = tower(pixels, view_grids)
        alone = torch.cat(list(one_by_one(tower, pixels, view_grids)))
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_views_do_not_see_each_other(tower: VisionTower) -> None:
    pixels, grids = views([(2, 3), (4, 4), (2, 3)])
    before = tower(pixels, grids)
    pixels[6:22] += 100
    after = tower(pixels, grids)
    assert torch.equal(before[:6], after[:6]) and torch.equal(before[22:], after[22:])
    assert not torch.equal(before[6:22], after[6:22])


def test_positions_follow_their_table(tower: VisionTower) -> None:
    pixels, grids = views([(3, 8)])
    table = tower.embeddings.position_embedding.weight
    with torch.no_grad():
        first = tower(pixels, grids)
        assert torch.equal(tower(pixels, grids), first)
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.5)
    tower(pixels, grids).square().mean().backward()
    assert table.grad is not None and table.grad.abs().sum() > 0
    # The class token, and rows of the square table that the other grid was made of.
    assert (table.grad.abs().sum(1) > 0).sum() > 20
    for parameter in tower.parameters():
        if parameter is not table:
            parameter.grad = None
    optimizer.step()
    with torch.no_grad():
        stepped = tower(pixels, grids)
    assert not torch.allclose(stepped, first)
    other = make_pair()[0]
    tower.load_state_dict(other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels, grids), first, rtol=0, atol=0)
    with torch.inference_mode():
        tower(pixels, grids)
    tower(pixels, grids).sum().backward()  # nothing of the inference run is left in the graph


def test_resampled_positions_are_the_table_on_its_own_grid() -> None:
    table = torch.randn(36, 8)
    assert resample_positions(table, (6, 6)) is table
    flat = resample_positions(torch.ones(36, 8), (3, 11))
    torch.testing.assert_close(flat, torch.ones(33, 8))
    half = resample_positions(table.bfloat16(), (3, 5))
    assert half.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_checkpointing_gives_the_same_gradients() -> None:
    config = LlavaUHDConfig(
        vision_config=vision_config(),
        text_config=LlamaConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=16,
        ),
    )
    torch.manual_seed(0)
    model = LlavaUHDForConditionalGeneration(config).train()
    calls: list[int] = []
    model.vision_tower.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    pixels, grids = views([(3, 4), (2, 2)])
    gradients = []
    for checkpointing in (False, True):
        calls.clear()
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.vision_tower(pixels, grids).square().sum().backward()
        assert len(calls) == 1 + checkpointing  # computed again in the backward pass
        named = model.vision_tower.named_parameters()
        gradients.append({name: parameter.grad.clone() for name, parameter in named})
    assert any(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-7, msg=name)


def test_frozen_tower_keeps_no_graph(tower: VisionTower) -> None:
    pixels, grids = views([(3, 4)])
    assert tower(pixels, grids).requires_grad
    tower.requires_grad_(False)
    features = tower(pixels.requires_grad_(), grids)
    assert not tower.trainable and features.grad_fn is None and not features.requires_grad
    tower.layers[-1].mlp.fc1.weight.requires_grad_(True)
    assert tower(pixels, grids).requires_grad


def test_only_the_needed_layers_are_built() -> None:
    assert len(VisionTower(vision_config(), -2).layers) == 2
    assert len(VisionTower(vision_config(), -1).layers) == 3
    assert len(VisionTower(vision_config(), 0).layers) == 0
    assert num_built_layers(24, -2) == 23
    for wrong in (-5, 4):
        with pytest.raises(UserError, match="use -4 to 3"):
            VisionTower(vision_config(), wrong)


def test_leaves_the_given_configuration_alone() -> None:
    config = vision_config()
    VisionTower(config)
    assert config._attn_implementation == "eager"


def test_refuses_grids_that_do_not_add_up(tower: VisionTower) -> None:
    pixels, _ = views([(3, 4)])
    with pytest.raises(ValueError, match="12"):
        tower(pixels, torch.tensor([[3, 5]]))


def test_half_precision_and_groups(tower: VisionTower) -> None:
    pixels, grids = views([(3, 4), (2, 2), (4, 3)])
    full = tower(pixels, grids)
    half = tower.bfloat16()(pixels, grids)
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().max() < 0.1 * full.abs().max()
    assert ViewGroups(((2, 5), (1, 7))).lengths == [5, 5, 7]
