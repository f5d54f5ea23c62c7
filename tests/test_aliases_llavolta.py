"""The published commands of LLaVolta, rebuilt from their description, and flags one by one."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest

from llava_uhd.config.aliases import ALIASES
from llava_uhd.config.compression import CompressionConfig, parse_schedule
from llava_uhd.config.recipe import load_recipe
from llava_uhd.config.training import Recipe
from llava_uhd.errors import UserError
from llava_uhd.train.compression import RunLength, check_length, spans

PRETRAIN, FINETUNE = "llava_1_5/pretrain_vicuna7b", "llava_1_5/finetune_vicuna7b"

COMMON = """
    --model_name_or_path lmsys/vicuna-7b-v1.5 --vision_tower openai/clip-vit-large-patch14-336
    --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False
    --mm_use_im_patch_token False --bf16 True --num_train_epochs 1 --per_device_eval_batch_size 4
    --evaluation_strategy "no" --save_strategy "steps" --save_total_limit 1 --weight_decay 0.
    --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1 --tf32 True
    --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4
    --lazy_preprocess True --report_to wandb --gradient_accumulation_steps 1
"""
FIRST = f"""{COMMON} --deepspeed ./scripts/zero2.json --version plain --tune_mm_mlp_adapter True
    --data_path $ROOT_DATA/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json
    --image_folder $ROOT_DATA/LLaVA-Pretrain/images --per_device_train_batch_size 32
    --save_steps 24000 --learning_rate 1e-3
"""
SECOND = f"""{COMMON} --deepspeed ./scripts/zero3.json --version v1 --image_aspect_ratio pad
    --data_path $ROOT_DATA/LLaVA-Tuning/llava_v1_5_mix665k.json
    --image_folder $ROOT_DATA/LLaVA-Tuning --group_by_modality_length True
    --per_device_train_batch_size 16 --save_steps 50000 --learning_rate 2e-5
"""
HEAVY = "--grouping avgpool1d --layers 2,0 --strides 8,1 --pivots 10000 --progressive True"
LIGHT = "--grouping avgpool1d --layers 16,0 --strides 8,1 --pivots 10000 --progressive True"
STAGES = """--grouping avgpool1d --layers 2,2,16,0 --strides 8,2,2,1 --pivots 1300,2600,3900
    --progressive True"""
COMPRESSED = "$ROOT_WEIGHT/llava-v1.5-7b-pretrain-compression/mm_projector.bin"
# Name: flags of both stages, and the projector that the second one reads.
SCRIPTS = {
    "reproduce": ("", "", "$ROOT_WEIGHT/llava-v1.5-7b-pretrain-reproduce/mm_projector.bin"),
    "heavy-compression": (HEAVY, HEAVY, COMPRESSED),
    "light-compression": (LIGHT, LIGHT, COMPRESSED),
    "4stage": ("", STAGES, "$ROOT_WEIGHT/llava-v1.5-7b-pretrain-4stage/mm_projector.bin"),
}
TEXTS = {
    "": None,
    HEAVY: "2/8@10000 0/1",
    LIGHT: "16/8@10000 0/1",
    STAGES: "2/8@1300 2/2@2600 16/2@3900 0/1",
}
# The other flags that the published program declares, at their defaults.
DECLARED = """
    --pretrain_abstractor False --tune_abstractor False --abstractor_kernel_size 3
    --num_pre_layers 3 --num_post_layers 3 --abstractor_rel_pos_spatial False --halfpool False
    --unified_vpe False --citer 1 --ignore_data_skip False
"""


def command(name: str, second: bool) -> tuple[str, str]:
    """The words of a stage, and its flags of compression."""
    flags = SCRIPTS[name][second]
    if not second:
        return f"{FIRST} {flags} --output_dir $ROOT_WEIGHT/llava-v1.5-7b-pretrain-{name}", flags
    words = f"{SECOND} {flags} --pretrain_mm_mlp_adapter {SCRIPTS[name][2]}"
    return f"{words} --output_dir $ROOT_WEIGHT/llava-v1.5-7b-{name}", flags


def load(recipe: str, words: str) -> Recipe:
    return load_recipe(recipe, shlex.split(words))


@pytest.mark.parametrize("declared", ["", DECLARED])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("name", SCRIPTS)
def test_published_commands(
    name: str, second: bool, declared: str, caplog: pytest.LogCaptureFixture
) -> None:
    words, flags = command(name, second)
    recipe = load(FINETUNE if second else PRETRAIN, f"{words} {declared}")
    assert recipe.compression.schedule == TEXTS[flags]
    if flags:
        section = recipe.compression
        assert (section.method, section.remainder, section.positions) == (
            *("avgpool1d", "drop", "half"),
        )
    else:
        assert recipe.compression == CompressionConfig()
    # Everything else is LLaVA-1.5.
    plain = words.replace(flags, "") if flags else words
    same = load(FINETUNE if second else PRETRAIN, f"{plain} {declared}")
    assert dataclasses.replace(recipe, compression=CompressionConfig()) == same
    assert recipe.trainer.batch_plan(8) == ((16, 1) if second else (32, 1))
    if declared:
        assert recipe.trainer.arguments["ignore_data_skip"] is False
        for flag in DECLARED.split("--")[1:]:
            told = f"--{flag.split()[0]} "
            assert (told in caplog.text) is not flag.startswith("ignore_data_skip")
    other = load(PRETRAIN if second else FINETUNE, f"{words} {declared}")
    assert other.compression == recipe.compression, "over another recipe"


def test_published_runs_end_as_they_are_evaluated() -> None:
    """Forward passes of the published runs: 5198 steps of one micro-batch."""
    ends = {HEAVY: "2/8", LIGHT: "16/8", STAGES: "off"}
    length = RunLength(5198, 5198, 1)
    for flags, label in ends.items():
        section = load(FINETUNE, flags).compression
        check_length(section, length)
        trained = [s for s in spans(parse_schedule(str(section.schedule)), length)]
        last = [span for span in trained if span.first < span.stop][-1]
        assert last.stage.label == label and last.stop == 5198


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--grouping avgpool1d --layers 2 --strides 8", (2, 8, None)),
        ("--grouping avgpool1d --layers 2,0 --strides 8,1 --progressive False", (2, 8, None)),
        ("--grouping avgpool1d --layers=-1 --strides 8", (-1, 8, None)),
        (
            "--grouping avgpool1d --layers 2,0 --strides 8,1 --progressive True",
            (-1, 1, "2/8@2600 0/1"),  # the published default
        ),
        (
            "--grouping avgpool1d --layers 2,2,16,0 --strides 8,2,2,1 --pivots 1300 "
            "--progressive True",
            (-1, 1, "2/8@1300 2/2 16/2 0/1"),  # then 10000
        ),
        (
            '--grouping avgpool1d --layers "2, 0, 5" --strides 8,1 --pivots 7,9,11 '
            "--progressive True",
            (-1, 1, "2/8@7 0/1@9"),  # the shorter list ends it
        ),
    ],
)
def test_flags_together(words: str, expected: tuple[int, int, str | None]) -> None:
    for given in (words, " ".join(f"--{each}" for each in reversed(words[2:].split(" --")))):
        section = load(FINETUNE, given).compression
        assert (section.layer, section.stride, section.schedule) == expected, given
        assert (section.method, section.remainder, section.positions) == (
            *("avgpool1d", "drop", "half"),
        )


def test_flags_without_grouping_do_nothing(caplog: pytest.LogCaptureFixture) -> None:
    words = "--layers 2,0 --strides 8,1 --pivots 5 --progressive True"
    assert load(FINETUNE, words).compression == CompressionConfig()
    assert caplog.text.count("it only matters with --grouping avgpool1d") == 4
    assert load(FINETUNE, f"{words} --grouping none").compression == CompressionConfig()
    assert "--grouping none has no effect here: nothing is compressed" in caplog.text


def test_flags_over_a_recipe_that_compresses(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: {FINETUNE}\ncompression: {{schedule: four_stage}}\n")
    assert load(file, "--grouping none").compression == CompressionConfig()
    kept = load(file, "--grouping avgpool1d").compression
    assert (kept.schedule, kept.remainder, kept.positions) == ("four_stage", "drop", "half")
    fixed = load(file, "--grouping avgpool1d --layers 16 --strides 4").compression
    assert (fixed.layer, fixed.stride, fixed.schedule) == (16, 4, None)
    later = load(file, f"{HEAVY} --compression.schedule light").compression
    assert later.schedule == "light"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--grouping kmeans --layers 2 --strides 8", "--grouping kmeans: of the published ones"),
        ("--grouping avgpool1d", "needs --layers and --strides"),
        ("--grouping avgpool1d --layers 2", "needs --layers and --strides"),
        ("--grouping avgpool1d --layers two --strides 8", "--layers must be whole numbers"),
        ("--grouping avgpool1d --layers 2,,0 --strides 8,1", "--layers must be whole numbers"),
        ("--grouping avgpool1d --layers 2 --strides 0", "stride must be at least 1"),
        ("--grouping avgpool1d --layers 2,0 --strides 8,1 --pivots 0 --progressive True",
         "the count in '2/8@0' must be at least 1"),
        ("--grouping avgpool1d --layers 2,0 --strides 8,1 --progressive maybe",
         "--progressive must be True or False"),
    ],
)  # fmt: skip
def test_impossible_flags(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(FINETUNE, words)
    assert "\n" not in str(caught.value)


def test_ignored_flags_say_why() -> None:
    for flag in DECLARED.split("--")[1:]:
        name = flag.split()[0]
        if name != "ignore_data_skip":  # the library's own
            assert ALIASES.get(name).inert
