"""Recipes of LLaVA-UHD v2: their published settings, one step of each, and the switch to v1."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fixtures_runs import Train, assert_same_run, break_at, run_here, weights
from safetensors.torch import load_file

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.config.recipe import load_recipe
from llava_uhd.config.training import Recipe, StageConfig
from llava_uhd.data.synthetic import embedded_split
from llava_uhd.errors import UserError
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.train.stages import apply_stage, learns, parameter_groups, part_of, part_reports

MODELS = ("vicuna7b", "vicuna13b", "qwen2_7b")
STAGES = ("pretrain", "finetune")
EVERYTHING = ("vision_tower", "projector", "upsampler_fixup", "language_model")
TO_V1 = ("--mm_projector_type", "adapt_spatial_resampler_v1", "--feature_mode", "uhd_v1")
ONE_STEP = ("--debug", "--trainer.max_steps", "1", "--trainer.save_steps", "1")
ONE_STEP += ("--trainer.warmup_steps", "0")


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_published_settings(model: str) -> None:
    first, second = (load_recipe(f"uhd_v2/{stage}_{model}") for stage in STAGES)
    old = model == "vicuna7b"
    for recipe in (first, second):
        arguments = recipe.trainer.arguments
        assert (arguments["num_train_epochs"], arguments["weight_decay"]) == (1, 0)
        assert (arguments["warmup_steps"], arguments["lr_scheduler_type"]) == (0.03, "cosine")
        assert (arguments["bf16"], arguments["tf32"]) == (True, True)
        assert (arguments["gradient_checkpointing"], arguments["dataloader_num_workers"]) == (
            True,
            4,
        )
        assert (recipe.deepspeed, recipe.model.select_layer) == ("zero2", -2)
        projector, image = recipe.model.projector, recipe.model.image
        assert (projector.type, projector.num_queries) == ("hiwin", 144)
        assert projector.scales == ((1, 2, 4) if old else (1, 4))
        assert image.layout == ("rows" if old else "slices")
        assert (image.max_slices, image.scale_resolution, image.patch_size) == (7, 336, 14)
    assert first.stage.learn == {"projector": None}
    assert second.stage.learn == dict.fromkeys(EVERYTHING)
    assert (first.data.overview_only, second.data.overview_only) == (True, False)
    assert (first.data.max_length, second.data.max_length) == (3072 if old else 4096, 4096)
    assert (first.trainer.batch_plan(8), second.trainer.batch_plan(8)) == (
        (32, 1),
        (8, 2) if old else (4, 4),
    )
    assert first.trainer.arguments["learning_rate"] == 1e-3
    assert second.trainer.arguments["learning_rate"] == 2e-5
    assert first.trainer.arguments["dataloader_drop_last"] is not old
    saving = [second.trainer.arguments[key] for key in ("save_steps", "save_total_limit")]
    assert saving == ([100, 1] if old else [500, 2])
    assert (second.data.textvqa_long_side, second.data.six_slice_probability) == (1024, 0.1)
    assert second.data.textvqa_only_enlarge is old
    assert (first.model.projector.train_positions, second.model.projector.train_positions) == (
        True,
        not old,
    )
    templates = ("qwen_1_5", "qwen_1_5") if model == "qwen2_7b" else ("plain", "v1")
    assert (first.model.template, second.model.template) == templates
    assert second.model.projector_file == first.output_dir
    assert (
        first.model.upsampler_file == load_recipe("uhd_v2/pretrain_vicuna7b").model.upsampler_file
    )


def test_the_upsampler_of_the_recipes_is_what_the_pre_training_writes() -> None:
    from llava_uhd.config.recipe import find_recipe
    from llava_uhd.config.typed import load_yaml

    written = load_yaml(find_recipe("vdim/better"))["trainer"]["output_dir"]
    assert load_recipe("uhd_v2/pretrain_vicuna7b").model.upsampler_file == written


# --- the switch to v1 and back --------------------------------------------------------------------


def kind(recipe: Recipe) -> tuple[str, int, tuple[int, ...], str]:
    projector = recipe.model.projector
    return projector.type, projector.num_queries, projector.scales, recipe.model.image.layout


V1 = ("spatial_resampler", 144, (1,), "slices")
V1_OLD = ("spatial_resampler", 144, (1,), "rows")  # the layout is the dialect's
OLD = ("hiwin", 144, (1, 2, 4), "rows")
NEW = ("hiwin", 144, (1, 2, 4), "slices")


@pytest.mark.parametrize(
    ("recipe", "words", "expected"),
    [
        ("uhd_v2/{}_vicuna7b", " ".join(TO_V1), V1_OLD),
        ("uhd_v2/{}_vicuna7b", "--feature_mode uhd_v1 --mm_projector_type uhd_v1_query64", V1_OLD),
        ("uhd_v2/{}_vicuna7b", "--feature_mode uhd_v1", V1_OLD),
        ("uhd_v2/{}_vicuna7b", "--mm_projector_type adapt_spatial_resampler_v1", V1_OLD),
        ("uhd_v2/{}_vicuna7b", "--mm_projector_type adapt_spatial_resampler", OLD),
        ("uhd_v2/{}_vicuna7b", "--model_mode uhd_v2", NEW),
        ("uhd_v2/{}_vicuna13b", "--model_mode uhd_v1", V1),
        ("uhd_v2/{}_qwen2_7b", "--model_mode uhd_v1", V1),
        ("uhd_v1/{}_vicuna7b", "--mm_projector_type adapt_spatial_resampler", V1),
        (
            "uhd_v1/{}_vicuna7b",
            "--mm_projector_type adapt_spatial_resampler --feature_mode featup_muti_res",
            OLD,
        ),
        ("uhd_v1/{}_vicuna13b", "--model_mode uhd_v2", NEW),
        ("uhd_v1/{}_vicuna7b", "--mm_projector_type adapt_spatial_resampler_v2", NEW),
    ],
)
def test_modes(recipe: str, words: str, expected: tuple[str, int, tuple[int, ...], str]) -> None:
    flags = words.split()
    if "uhd_v1_query64" in words:
        expected = (expected[0], 64, *expected[2:])
    before = [load_recipe(recipe.format(stage)) for stage in STAGES]
    # The flags decide together, whatever their order.
    swapped = flags[2:] + flags[:2]
    for given in (flags, swapped):
        first, second = (load_recipe(recipe.format(stage), given) for stage in STAGES)
        assert kind(first) == kind(second) == expected
        # The two stages still find each other, and no folder of the other kind is used.
        assert second.model.projector_file == first.output_dir
        changed = first.model.projector.type != before[0].model.projector.type
        assert (first.output_dir != before[0].output_dir) is changed
        assert (second.output_dir != before[1].output_dir) is changed
        if expected[0] == "spatial_resampler":
            assert first.model.upsampler_file is None
            assert "upsampler_fixup" not in second.stage.learn
    explicit = load_recipe(recipe.format("finetune"), ["--output_dir", "mine", *flags])
    assert explicit.output_dir == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--feature_mode uhd_v3", "only uhd_v1, featup_muti_res exist here"),
        ("--model_mode llava", "only uhd_v1, uhd_v2 exist here"),
        ("--model_mode [uhd_v1]", "only uhd_v1, uhd_v2 exist here"),
        ("--mm_projector_type [resampler]", "--mm_projector_type must be the name"),
        ("--feature_mode uhd_v1 --model_mode uhd_v2", "contradict each other"),
        ("--feature_mode uhd_v1 --model_mode uhd_v1", "contradict each other"),
        ("--feature_mode featup_muti_res --model_mode uhd_v2", "contradict each other"),
        ("--feature_mode uhd_v1 --mm_projector_type adapt_spatial_resampler_v2", "is no projector"),
        ("--model_mode uhd_v2 --mm_projector_type uhd_v1_query64", "is no projector of the chosen"),
        ("--model_mode uhd_v2 --mm_projector_type linear", "does not belong to a LLaVA-UHD mode"),
        ("--feature_scale_mask 0", "a sum of 1, 2, 4 and 8"),
        ("--feature_scale_mask 16", "for instance 5 for 1x and 4x"),
        ("--feature_scale_mask abc", "for instance 5 for 1x and 4x"),
        ("--sft_vdim maybe", "--sft_vdim must be True or False"),
        ("--mm_tunable_parts mm_mlp", "a comma-separated list of mm_mlp_adapter"),
        ("--mm_projector_lr 1e-5 --mm_tunable_parts 3", "--mm_tunable_parts 3: a comma-separated"),
        ("--mm_vision_tower_lr 1e-5 --mm_tunable_parts 3", "--mm_tunable_parts 3: a comma-sep"),
        ("--use_pos_skipping True", "leave it False"),
    ],
)
def test_mistakes_in_flags(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe("uhd_v2/finetune_vicuna13b", words.split())
    assert "\n" not in str(caught.value)


def test_flags_of_the_other_kind_have_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    words = "--feature_scale_mask 7 --jbu_ckpt v.ckpt --sft_vdim True --sft_encoder True"
    recipe = load_recipe("uhd_v2/finetune_vicuna7b", [*words.split(), *TO_V1])
    assert kind(recipe) == V1_OLD and recipe.model.upsampler_file is None
    assert recipe.stage.learn == dict.fromkeys(("projector", "language_model", "vision_tower"))
    told = [record.message for record in caplog.records]
    assert [line.split()[0] for line in told] == [
        "--feature_scale_mask",
        "--jbu_ckpt",
        "--sft_vdim",
    ]


def test_masks_are_scales() -> None:
    for mask, scales in ((3, (1, 2)), (5, (1, 4)), (7, (1, 2, 4)), (15, (1, 2, 4, 8))):
        words = ["--feature_scale_mask", str(mask)]
        assert load_recipe("uhd_v2/finetune_qwen2_7b", words).model.projector.scales == scales


# --- one step of each -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uhd_v2")
    embedded_split("debug", "pretrain", folder / "playground/data")
    return folder


@pytest.fixture
def train(workplace: Path) -> Iterator[Train]:
    level = logging.getLogger().level
    yield lambda *words: run_here(workplace, *words)
    logging.getLogger().setLevel(level)


def parts_in(folder: Path) -> set[str]:
    """Parts whose weights the checkpoint of step 1 holds."""
    return {part_of(name) for name in load_file(folder / "checkpoint-1/trainable.safetensors")}


@pytest.mark.parametrize("model", MODELS)
def test_both_stages_at_debug_size(model: str, train: Train) -> None:
    first = train(f"uhd_v2/pretrain_{model}", f"{model}/first", *ONE_STEP)
    assert parts_in(first) == {"projector"}
    before = weights(first)
    second = train(
        f"uhd_v2/finetune_{model}", f"{model}/second", *ONE_STEP, "--trainer.learning_rate", "1e-3",
        "--model.projector_file", f"{model}/first",
    )  # fmt: skip
    assert parts_in(second) == set(EVERYTHING)
    after = weights(second)
    for name, tensor in after.items():
        part = part_of(name)
        if part == "upsampler":
            assert torch.equal(tensor, before[name]), name
    moved = "projector.upsampler.fixup_proj.1.weight"
    assert not torch.equal(after[moved], before[moved])
    built, processor = load_pretrained(second)
    assert built.config.projector.type == "hiwin"
    assert built.config.text_config.model_type == ("qwen2" if model == "qwen2_7b" else "llama")
    assert processor.image_config.layout == ("rows" if model == "vicuna7b" else "slices")


@pytest.mark.parametrize(
    ("recipe", "words", "expected"),
    [
        ("uhd_v2/finetune_vicuna7b", TO_V1, "spatial_resampler"),
        ("uhd_v2/finetune_qwen2_7b", ("--model_mode", "uhd_v1"), "spatial_resampler"),
        (
            "uhd_v1/finetune_vicuna7b",
            ("--mm_projector_type", "adapt_spatial_resampler", "--feature_mode", "featup_muti_res"),
            "hiwin",
        ),
        ("uhd_v1/finetune_vicuna13b", ("--model_mode", "uhd_v2", "--sft_vdim", "True"), "hiwin"),
    ],
)
def test_the_switch_trains(
    recipe: str, words: tuple[str, ...], expected: str, train: Train, tmp_path: Path
) -> None:
    folder = train(recipe, str(tmp_path / "out"), *ONE_STEP, *words)
    model, _ = load_pretrained(folder)
    assert model.config.projector.type == expected
    assert ("upsampler_fixup" in parts_or_all(folder)) is ("--sft_vdim" in words)


def parts_or_all(folder: Path) -> set[str]:
    """Parts of the checkpoint; all of them where everything learned."""
    return parts_in(folder) if (folder / "checkpoint-1/trainable.safetensors").is_file() else set()


def test_a_broken_run_goes_on_exactly(train: Train, tmp_path: Path) -> None:
    """With a learning upsampler, whose dropout draws random numbers too."""
    words = ("--debug", "--trainer.learning_rate", "1e-3", "--trainer.warmup_steps", "0")
    whole = train("uhd_v2/finetune_vicuna7b", str(tmp_path / "whole"), *words)
    given = ("uhd_v2/finetune_vicuna7b", str(tmp_path / "broken"), *words)
    break_at(3, train, *given)
    assert_same_run(whole, train(*given))


@pytest.mark.parametrize("mask", ["2", "15"])
def test_other_scales_train(mask: str, train: Train, tmp_path: Path) -> None:
    words = ("--mm_projector_type", "adapt_spatial_resampler_v2", "--feature_scale_mask", mask)
    learn = ("--stage.learn", "{projector: null, upsampler: 1e-4}")
    folder = train("uhd_v2/pretrain_vicuna13b", str(tmp_path / "out"), *ONE_STEP, *words, *learn)
    assert parts_in(folder) == {"projector", "upsampler", "upsampler_fixup"}


# --- parts ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> LlavaUHDForConditionalGeneration:
    from fixtures_tiny import tiny_parts

    return tiny_parts(projector={"type": "hiwin", "scales": [1, 4]})[0]


def test_every_parameter_belongs_to_one_part(model: LlavaUHDForConditionalGeneration) -> None:
    found = {part_of(name) for name, _ in model.named_parameters()}
    assert found == {"vision_tower", "projector", "upsampler", "upsampler_fixup", "language_model"}
    assert part_of("projector.upsampler.up1.fixup_proj.0.weight") == "upsampler"
    assert part_of("projector.upsampler.fixup_proj_2x.1.weight") == "upsampler_fixup"
    stack = sum(p.numel() for p in model.projector.upsampler.parameters())
    reports = {
        each.name: each for each in part_reports(model, StageConfig(learn={"projector": 1}), 1)
    }
    assert reports["upsampler"].total + reports["upsampler_fixup"].total == stack
    everything = sum(p.numel() for p in model.parameters())
    assert sum(each.total for each in reports.values()) == everything


@pytest.mark.parametrize(
    ("learn", "rates"),
    [
        ({"projector": None}, {"projector": 5.0}),
        ({"upsampler_fixup": 2.0}, {"upsampler_fixup": 2.0}),
        ({"upsampler": 3.0}, {"upsampler": 3.0, "upsampler_fixup": 3.0}),
        ({"upsampler": None, "upsampler_fixup": 2.0}, {"upsampler": 5.0, "upsampler_fixup": 2.0}),
        ({"projector": 1.0, "upsampler_fixup": None}, {"projector": 1.0, "upsampler_fixup": 5.0}),
    ],
)
def test_parts_learn_at_their_rates(
    model: LlavaUHDForConditionalGeneration, learn: dict[str, float | None], rates: dict[str, float]
) -> None:
    stage = StageConfig(learn=learn)
    apply_stage(model, stage)
    groups = parameter_groups(model, stage, 5.0, 0.1, set())
    names = {parameter: part_of(name) for name, parameter in model.named_parameters()}
    found = {names[each]: group["lr"] for group in groups for each in group["params"]}
    assert found == rates
    assert {part for part in set(names.values()) if learns(part, stage)} == set(rates)
    reports = part_reports(model, stage, 5.0)
    assert {each.name: each.rate for each in reports if each.rate is not None} == rates
    assert all(each.learning in (0, each.total) for each in reports)
    assert model.train().projector.upsampler.training is bool(
        set(rates) & {"upsampler", "upsampler_fixup"}
    )


def test_an_upsampler_that_is_not_there(model: LlavaUHDForConditionalGeneration) -> None:
    from fixtures_tiny import tiny_parts

    for word in ("stage.learn.upsampler true", "model.upsampler_file vdim.ckpt"):
        with pytest.raises(UserError, match="needs an upsampler, but model.projector.scales is"):
            load_recipe("uhd_v1/pretrain_vicuna7b", f"--{word}".split())
    other = tiny_parts()[0]
    for part in ("upsampler", "upsampler_fixup"):
        with pytest.raises(UserError, match=rf"stage.learn.{part}: .* has no upsampler"):
            apply_stage(other, StageConfig(learn={"projector": None, part: None}))
    assert [each.name for each in part_reports(other, StageConfig(learn={"projector": 1}), 1)] == [
        "vision_tower",
        "projector",
        "language_model",
    ]
