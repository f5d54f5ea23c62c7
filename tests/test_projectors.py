"""The contract that every registered projector keeps."""

from __future__ import annotations

import pytest
import torch

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.images.cost_projectors import PROJECTOR_COSTS
from llava_uhd.images.tokens import TOKEN_RULES, view_token_counts
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.projectors import PROJECTORS, build_projector

# What is tried of a projector beside its defaults.
OPTIONS: dict[str, list[dict[str, object]]] = {
    "hiwin": [{"scales": (1, 2)}, {"scales": (1, 4), "form": "plain"}, {"scales": (4,)}],
    "pixel_unshuffle_mlp": [{"unshuffle": 4}],
}
CASES = [
    {"type": name, **options} for name in PROJECTORS for options in [{}, *OPTIONS.get(name, [])]
]
GRIDS = [(4, 6), (2, 2), (3, 5), (4, 6), (7, 2)]
KV_WIDTH, WIDTH, PATCH = 12, 32, 4


def tower_width(options: dict[str, object]) -> int:
    return WIDTH if options["type"] == "identity" else KV_WIDTH


def make_config(options: dict[str, object]) -> LlavaUHDConfig:
    return LlavaUHDConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": tower_width(options),
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": PATCH,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": WIDTH,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 8,
        },
        projector={"num_queries": 16, "num_heads": 2, **options},
    )


def make_model(options: dict[str, object]) -> LlavaUHDForConditionalGeneration:
    torch.manual_seed(0)
    return LlavaUHDForConditionalGeneration(make_config(options)).eval()


def inputs(
    grids: list[tuple[int, int]], width: int = KV_WIDTH
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = sum(rows * columns for rows, columns in grids)
    features = torch.randn(count, width, generator=generator)
    pixels = torch.randn(count, 3 * PATCH**2, generator=generator)
    return features, torch.tensor(grids), pixels


@pytest.mark.parametrize("options", CASES, ids=str)
def test_counts_order_and_packing(options: dict[str, object]) -> None:
    """As many tokens as the rule says, in the order of the views, whatever stands beside them."""
    projector = make_model(options).projector
    features, grids, pixels = inputs(GRIDS, tower_width(options))
    counts = view_token_counts(make_config(options).projector, GRIDS)
    with torch.no_grad():
        tokens = projector(features, grids, pixels)
        assert tokens.shape == (sum(counts), WIDTH) and bool(tokens.isfinite().all())
        lengths = [rows * columns for rows, columns in GRIDS]
        parts = zip(features.split(lengths), grids.split(1), pixels.split(lengths), strict=True)
        alone = [projector(*part) for part in parts]
    assert [len(each) for each in alone] == counts
    torch.testing.assert_close(tokens, torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert tokens[: counts[0]].std(0).max() > 0, "tokens of a view differ"


@pytest.mark.parametrize("options", CASES, ids=str)
def test_every_parameter_learns(options: dict[str, object]) -> None:
    projector = make_model(options).projector
    features, grids, pixels = inputs(GRIDS, tower_width(options))
    features.requires_grad_()
    projector(features, grids, pixels).square().sum().backward()
    assert features.grad is not None and bool(features.grad.any())
    for name, parameter in projector.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("options", CASES, ids=str)
def test_half_precision(options: dict[str, object]) -> None:
    projector = make_model(options).projector.bfloat16()
    features, grids, pixels = inputs(GRIDS, tower_width(options))
    with torch.no_grad():
        tokens = projector(features.bfloat16(), grids, pixels)
    assert tokens.dtype == torch.bfloat16 and bool(tokens.isfinite().all())


@pytest.mark.parametrize("options", CASES, ids=str)
def test_built_without_storage(options: dict[str, object]) -> None:
    """Nothing that matters is computed while the module is built."""
    with torch.device("meta"):
        empty = build_projector(make_config(options))
    assert not list(empty.buffers())
    filled = make_model(options).projector.eval()
    empty.load_state_dict(filled.state_dict(), assign=True)
    with torch.no_grad():
        torch.testing.assert_close(
            empty.eval()(*inputs(GRIDS, tower_width(options))),
            filled(*inputs(GRIDS, tower_width(options))),
        )


def test_every_projector_has_its_rules() -> None:
    names = set(PROJECTORS)
    assert {"spatial_resampler", "hiwin", "linear", "mlp2x_gelu", "identity"} <= names
    assert names <= set(TOKEN_RULES) and names <= set(PROJECTOR_COSTS)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_initial_values(options: dict[str, object]) -> None:
    """A new model's parameters are filled with sane numbers."""
    for name, parameter in make_model(options).projector.named_parameters():
        assert bool(parameter.isfinite().all()) and parameter.abs().max() < 30, name
        if parameter.dim() > 1 and not name.endswith("embedding"):
            assert parameter.std() > 0, name


def test_unshuffled_squares_against_a_loop() -> None:
    """Each token is made of one square of patches, row by row, zeros beyond the border."""
    projector = make_model({"type": "pixel_unshuffle_mlp"}).projector
    features, grids, _ = inputs([(3, 5)])
    cells = features.reshape(3, 5, KV_WIDTH)
    expected = []
    for top in range(0, 3, 2):
        for left in range(0, 5, 2):
            square = [
                cells[y, x] if y < 3 and x < 5 else torch.zeros(KV_WIDTH)
                for y in (top, top + 1)
                for x in (left, left + 1)
            ]
            expected.append(torch.cat(square))
    with torch.no_grad():
        wanted = projector.layers(projector.norm(torch.stack(expected)))
        torch.testing.assert_close(projector(features, grids), wanted)
