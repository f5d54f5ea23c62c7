"""Published LLaVA-UHD v2 checkpoints: both dialects, Llama and Qwen2, against the original code."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_checkpoint import V2_NAMES, Parts, assert_same, v2_folders
from safetensors.torch import load_file

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.projector_names import HIWIN_UNUSED
from llava_uhd.checkpoint.published import (
    LAYOUTS,
    UHD_V2,
    VISION_PREFIX,
    find_layout,
    our_key,
    published_key,
)
from llava_uhd.checkpoint.published.uhd_v2 import mask_to_scales
from llava_uhd.checkpoint.shapes import describe_checkpoint, known_model
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.images.cost import count_parameters
from llava_uhd.images.pixels import open_image
from llava_uhd.projectors import build_projector


@pytest.fixture(scope="module")
def folders(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return v2_folders(golden / "uhd_v2", tmp_path_factory.mktemp("uhd_v2"))


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, Parts]:
    return {name: load_pretrained(folder) for name, folder in folders.items()}


def within(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> bool:
    assert found.shape == wanted.shape
    return bool(((found - wanted).abs() <= bound + 1e-4 * wanted.abs()).all())


def image_positions(case: dict[str, Any], queries: int, rows: bool, token: int) -> list[int]:
    """Ids that stand for the image of a case, from its record alone."""
    schema = case["ind_tokens"]
    if not rows or not schema:
        slices = [[token] * queries + [separator] for separator in schema]
        return [*itertools.chain(*slices), *[token] * queries]
    columns = schema.index(13) + 1
    side = int(queries**0.5)
    line = [*[token] * (columns * side), schema[columns - 1]]
    return line * (len(schema) // columns * side) + [schema[0]] + [token] * queries


@pytest.mark.parametrize("name", V2_NAMES)
def test_golden_sequences_projections_and_logits(
    name: str, golden: Path, loaded: dict[str, Parts]
) -> None:
    source = golden / "uhd_v2"
    model, processor = loaded[name]
    facts = json.loads((source / name / "cases.json").read_text())
    tensors = load_file(source / name / "expected.safetensors")
    image = processor.image_config
    assert image.max_slices == facts["max_slice_nums"]
    assert image.newline_id == facts["newline_token_id"]
    image.comma_id = facts["comma_token_id"]  # the published constant is beyond this vocabulary
    queries = processor.projector_config.num_queries
    compared = set()
    for index, case in enumerate(facts["cases"]):
        picture = open_image(source / case["image"])
        inputs = processor(text=case["prompt"], images=[picture])
        ids = inputs["input_ids"][0].tolist()
        rows = image.layout == "rows"
        inside = image_positions(case, queries, rows, int(image.image_token_id or 0))
        place = case["input_ids"].index(-200)
        assert ids == case["input_ids"][:place] + inside + case["input_ids"][place + 1 :]
        assert len(ids) == case["sequence_length"]
        with torch.no_grad():
            features = model.vision_tower(inputs["pixel_values"], inputs["view_grids"])
            views = model.projector(features, inputs["view_grids"], inputs["pixel_values"])
            pixels = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
            found = {
                "projected_first": views[:8],
                "projected_overview": views[-queries:],
                "embeds_rowmean": model.embed(inputs["input_ids"], **pixels)[0].mean(-1),
                "logits_last": model(**inputs).logits[0, -1],
            }
        for key, values in found.items():
            wanted = tensors.get(f"case{index}.{key}")
            if wanted is None:
                continue
            compared.add(f"case{index}.{key}")
            bound = 2e-4 if key == "logits_last" else 1e-4
            assert within(values, wanted, bound), f"case{index}.{key}"
        assert int(found["logits_last"].argmax()) == case["argmax"]
        new = model.generate(**inputs, max_new_tokens=1, do_sample=False)
        assert int(new[0, -1]) == case["argmax"]
    assert compared == set(tensors)


def test_dialects_share_their_weights(loaded: dict[str, Parts]) -> None:
    new, old = loaded["full_llama"][0], loaded["full_llama_old"][0]
    assert_same(new, old)
    assert (new.config.image.layout, old.config.image.layout) == ("slices", "rows")
    for name, layout in (("full_llama", "slices"), ("full_llama_old", "rows")):
        assert loaded[name][1].image_config.layout == layout


def test_shapes_without_weights(folders: dict[str, Path], loaded: dict[str, Parts]) -> None:
    """What the cost model is told of a folder is the model that loads from it."""
    for name, folder in folders.items():
        model, config = loaded[name][0], describe_checkpoint(folder)
        assert config.projector == model.config.projector
        assert (config.select_layer, config.template) == (-2, model.config.template)
        counted = count_parameters(config)
        assert counted.total == sum(parameter.numel() for parameter in model.parameters())


def test_known_combinations() -> None:
    config = known_model("qwen2-7b-instruct", 144, "siglip-so400m-patch14-384", (1, 4))
    assert config.projector.type == "hiwin" and config.image.scale_resolution == 384
    assert config.image.normalisation == ((0.5,) * 3, (0.5,) * 3)
    with torch.device("meta"):
        projector = build_projector(config)
    built = sum(parameter.numel() for parameter in projector.parameters())
    assert count_parameters(config).projector == built


# --- recognition ----------------------------------------------------------------------------------

LLAMA = {"architectures": ["LlavaLlamaForCausalLM"]}
QWEN = {"model_type": "llava_qwen"}
HIWIN = ["model.mm_projector.query_1"]
V1 = ["model.mm_projector.query"]


def kind(name: str) -> dict[str, str]:
    return {"mm_projector_type": f"adapt_spatial_resampler{name}"}


@pytest.mark.parametrize(
    ("values", "names", "slug", "projector"),
    [
        (LLAMA | kind(""), [], "uhd_v1", "spatial_resampler"),
        (LLAMA | kind(""), V1, "uhd_v1", "spatial_resampler"),
        (LLAMA | kind(""), HIWIN, "uhd_v2_old", "hiwin"),
        (LLAMA | kind("") | {"feature_mode": "featup_muti_res"}, [], "uhd_v2_old", "hiwin"),
        (LLAMA | kind("") | {"feature_mode": "featup_muti_res"}, HIWIN, "uhd_v2_old", "hiwin"),
        (LLAMA | kind("_v1") | {"feature_mode": "uhd_v1"}, [], "uhd_v2_old", "spatial_resampler"),
        (LLAMA | kind("") | {"feature_mode": "uhd_v1"}, V1, "uhd_v2_old", "spatial_resampler"),
        (LLAMA | kind("_v1"), V1, "uhd_v2_old", "spatial_resampler"),
        (LLAMA | kind("_v1") | {"model_mode": "uhd_v1"}, [], "uhd_v2", "spatial_resampler"),
        (LLAMA | kind("_v2") | {"model_mode": "uhd_v2"}, [], "uhd_v2", "hiwin"),
        (LLAMA | kind("_v2_256"), [], "uhd_v2", "hiwin"),
        (QWEN | kind("_v2_64") | {"model_mode": "uhd_v2"}, HIWIN, "uhd_v2", "hiwin"),
        (QWEN | {"mm_projector_type": "uhd_v1_query64"}, V1, "uhd_v2", "spatial_resampler"),
    ],
)
def test_layouts_are_told_by_keys_and_weights(
    values: dict[str, Any], names: list[str], slug: str, projector: str
) -> None:
    layout = find_layout(values, names)
    assert layout is not None and layout.slug == slug
    assert [each.slug for each in LAYOUTS if each.matches(values, names)] == [slug]
    config = layout.make_config(values, LlavaUHDConfig().vision_config, names)
    assert config.projector.type == projector
    assert config.image.layout == ("rows" if slug == "uhd_v2_old" else "slices")
    queries = {"_v2_64": 64, "query64": 64, "_v2_256": 256}
    ending = next((end for end in queries if values["mm_projector_type"].endswith(end)), "")
    assert config.projector.num_queries == queries.get(ending, 144)


@pytest.mark.parametrize(
    "values",
    [
        LLAMA | {"mm_projector_type": "mlp2x_gelu", "model_mode": "llava"},
        {"architectures": ["LlavaMptForCausalLM"]} | kind("_v2"),
        {},
    ],
)
def test_other_systems_are_not_taken_for_it(values: dict[str, Any]) -> None:
    assert find_layout(values, []) is None


def test_masks_are_scales() -> None:
    assert [mask_to_scales(mask) for mask in (1, 3, 5, 7, 8)] == [
        (1,), (1, 2), (1, 4), (1, 2, 4), (8,),
    ]  # fmt: skip
    for mask in (0, 16, -1, "5", True, None):
        with pytest.raises(UserError, match="feature_scale_mask must be from 1 to 15"):
            mask_to_scales(mask)
    config = UHD_V2.make_config(LLAMA | kind("_v2"), LlavaUHDConfig().vision_config, [])
    assert config.projector.scales == (1, 2, 4)


def test_separators_of_published_models_are_constants() -> None:
    vision = LlavaUHDConfig().vision_config
    whole = UHD_V2.make_config(QWEN | kind("_v2") | {"vocab_size": 152064}, vision, [])
    assert (whole.image.comma_id, whole.image.newline_id) == (29892, 13)
    small = UHD_V2.make_config(QWEN | kind("_v2") | {"vocab_size": 264}, vision, [])
    assert (small.image.comma_id, small.image.newline_id) == (None, 13)


def test_templates_follow_model_and_stage() -> None:
    vision = LlavaUHDConfig().vision_config
    first = {"mm_tunable_parts": "mm_mlp_adapter"}
    for values, template in (
        (LLAMA, "v1"),
        (LLAMA | first, "plain"),
        (QWEN, "qwen_1_5"),
        (QWEN | first, "qwen_1_5"),
    ):
        assert UHD_V2.make_config(values | kind("_v2"), vision, []).template == template


def test_siglip_is_read_as_published() -> None:
    """Whatever layer is recorded, the published code reads the last but one of this tower."""
    values = LLAMA | kind("_v2") | {"mm_vision_select_layer": -7, "hidden_size": 256}
    values["mm_vision_tower"] = "somewhere/google/siglip-so400m-patch14-384"
    from llava_uhd.checkpoint.published import tower_config_by_name, tower_depth

    vision = tower_config_by_name(values)
    assert vision is not None
    config = UHD_V2.make_config(values, vision, [])
    assert (config.select_layer, tower_depth(config)) == (-2, 26)
    assert config.image.scale_resolution == 384
    assert config.image.mean == config.image.std == (0.5, 0.5, 0.5)


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", V2_NAMES)
def test_keys_map_one_to_one(name: str, folders: dict[str, Path], loaded: dict[str, Parts]) -> None:
    model, _ = loaded[name]
    layout = find_layout(json.loads((folders[name] / "config.json").read_text()))
    assert layout is not None
    stored = load_file(folders[name] / "model.safetensors")
    ours = {key: our_key(layout, key, model.config) for key in stored}
    reached = [key for key in ours.values() if key is not None]
    assert len(reached) == len(set(reached))
    assert set(reached) == model.state_dict().keys()
    for key, mapped in ours.items():
        if mapped is not None:
            assert published_key(mapped, model.config) == key
            assert torch.equal(model.state_dict()[mapped], stored[key].float()), key
    dead = {key for key, mapped in ours.items() if mapped is None}
    copies = {key for key in dead if ".mm_projector.upsampler.model." in key}
    left = {key.removeprefix("model.mm_projector.") for key in dead - copies}
    left = {key for key in left if not key.startswith(VISION_PREFIX)}
    assert copies and left == {
        "query",
        "kv_proj.weight",
        *(f"features_{scale}x_projector.{end}" for scale in (2, 8) for end in ("weight", "bias")),
        *(f"feature_{scale}x_embedding" for scale in (2, 8)),
    }
    with pytest.raises(KeyError):
        our_key(layout, "mystery.weight", model.config)


def test_every_unused_pattern_has_a_reason_and_a_use(
    folders: dict[str, Path], loaded: dict[str, Parts]
) -> None:
    stored = load_file(folders["full_llama"] / "model.safetensors")
    names = [key.partition("mm_projector.")[2] for key in stored if "mm_projector." in key]
    for pattern, reason in HIWIN_UNUSED.items():
        assert any(re.fullmatch(pattern, name) for name in names), pattern
        assert len(reason) > 10
    config = LlavaUHDConfig(projector={"type": "hiwin", "scales": [1]})
    ours = {our_key(UHD_V2, key, config) for key in stored if "mm_projector" in key}
    assert not any("upsampler" in key for key in ours - {None})


def test_learned_positions_are_loaded(folders: dict[str, Path], loaded: dict[str, Parts]) -> None:
    stored = load_file(folders["full_llama"] / "model.safetensors")
    for name in ("full_llama", "full_llama_old"):
        table = loaded[name][0].projector.pos_embed
        assert torch.equal(table, stored["model.mm_projector.pos_embed"].float())
