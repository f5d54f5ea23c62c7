from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from llava_uhd.config.recipe import find_recipe, list_recipes, load_recipe
from llava_uhd.config.training import Recipe, TrainerConfig
from llava_uhd.config.typed import Word, convert, load_yaml, parse_scalar
from llava_uhd.errors import UserError

PRETRAIN, FINETUNE = "uhd_v1/pretrain_vicuna13b", "uhd_v1/finetune_vicuna13b"


def test_published_hyper_parameters() -> None:
    for size in ("7b", "13b"):
        first = load_recipe(f"uhd_v1/pretrain_vicuna{size}")
        second = load_recipe(f"uhd_v1/finetune_vicuna{size}")
        for recipe in (first, second):
            arguments = recipe.trainer.arguments
            assert arguments["warmup_steps"] == 0.03
            assert arguments["lr_scheduler_type"] == "cosine"
            assert (arguments["weight_decay"], arguments["num_train_epochs"]) == (0, 1)
            assert (arguments["bf16"], arguments["tf32"]) == (True, True)
            assert (arguments["gradient_checkpointing"], arguments["optim"]) == (
                True,
                "adamw_torch",
            )
            assert (arguments["save_total_limit"], arguments["dataloader_num_workers"]) == (1, 4)
            assert (recipe.deepspeed, recipe.data.max_length) == ("zero2", 2048)
            image = recipe.model.image
            assert (image.max_slices, image.scale_resolution, image.patch_size) == (7, 336, 14)
            assert image.bounded is True
            assert recipe.model.projector.num_queries == 144
            assert recipe.data.textvqa_long_side == 1024
            assert recipe.data.six_slice_probability == 0.1
            assert f"vicuna-{size}-v1.5" in str(recipe.model.language_model)
        assert first.stage.learn == {"projector": None}
        assert second.stage.learn == {"projector": None, "language_model": None}
        assert first.trainer.arguments["learning_rate"] == 1e-3
        assert second.trainer.arguments["learning_rate"] == 2e-5
        assert (first.trainer.global_batch_size, second.trainer.global_batch_size) == (256, 128)
        assert (first.trainer.batch_plan(8), second.trainer.batch_plan(8)) == ((32, 1), (4, 4))
        assert (first.data.overview_only, second.data.overview_only) == (True, False)
        assert (first.model.template, second.model.template) == ("plain", "v1")
        assert second.trainer.group_by_modality_length is True
        assert first.trainer.group_by_modality_length is False
        assert (
            first.model.projector.train_positions,
            second.model.projector.train_positions,
        ) == (True, False)
        assert second.model.projector_file == first.output_dir


@pytest.mark.parametrize("name", list_recipes())
@pytest.mark.parametrize("debug", [False, True])
def test_every_recipe_loads_and_round_trips(name: str, debug: bool, tmp_path: Path) -> None:
    recipe = load_recipe(name, debug=debug)
    assert recipe.name == name
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(file) == recipe
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


def test_recipe_names_hide_bases() -> None:
    names = list_recipes()
    assert {PRETRAIN, FINETUNE, "debug/pretrain", "debug/finetune"} <= set(names)
    assert not any(name.startswith("_") for name in names)


def test_debug_keeps_the_stage_and_shrinks_the_rest() -> None:
    full = load_recipe(FINETUNE)
    small = load_recipe(FINETUNE, ["--debug", "--trainer.max_steps", "1"])
    assert small.debug and not full.debug
    assert (small.stage, small.model.template) == (full.stage, full.model.template)
    assert small.model.image.strategy == full.model.image.strategy
    assert small.model.projector.type == full.model.projector.type
    assert small.deepspeed == full.deepspeed
    assert small.trainer.group_by_modality_length is True
    assert isinstance(small.model.language_model, dict)
    assert small.model.language_model["hidden_size"] == 64
    assert small.model.language_model["num_hidden_layers"] == 2
    assert isinstance(small.model.vision_tower, dict)
    assert (small.data.path, small.data.embedded) == (None, "debug")
    assert small.model.projector_file is None
    assert small.trainer.arguments["max_steps"] == 1
    assert "num_train_epochs" not in small.trainer.arguments
    assert small.output_dir == f"checkpoints/debug/{FINETUNE}"
    assert load_recipe("debug/finetune").model.projector_file == "checkpoints/debug/pretrain"
    assert load_recipe("debug/pretrain").output_dir == "checkpoints/debug/pretrain"


def test_debug_with_own_data_keeps_them() -> None:
    words = ["--debug", "--data.path", "a.json", "--data.image_folder", "images"]
    recipe = load_recipe(FINETUNE, words)
    assert (recipe.data.path, recipe.data.embedded) == ("a.json", None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data.imagefolder x", r"unknown key 'data.imagefolder'; did you mean 'data.image_fold"),
        ("--modle.template v1", r"did you mean 'model.template'"),
        ("--data.learning_rate 1", r"did you mean 'trainer.learning_rate'"),
        ("--trainer.warmup_ratio 0.1", r"did you mean 'trainer.warmup_steps'"),
        ("--learning_rte 1", r"unknown option '--learning_rte'; did you mean 'learning_rate'"),
        ("--trainer.learning_rate fast", r"trainer.learning_rate must be a number, got 'fast'"),
        ("--model.image.max_slices 3.5", r"model.image.max_slices must be a whole number, got 3.5"),
        ("--data.overview_only 1", r"data.overview_only must be true or false, got 1"),
        ("--model.dtype int8", r"model.dtype must be auto or bfloat16"),
        ("--lr_scheduler_type cosin", r"trainer.lr_scheduler_type must be one of linear, cosine"),
        ("--stage.learn.projektor 1", r"stage.learn.projektor.*did you mean 'projector'"),
        ("--stage.learn.projector -1", r"stage.learn.projector must not be negative"),
        ("--tune_mm_mlp_adapter True --freeze_mm_mlp_adapter True", r"stage.learn is empty"),
        ("--model x", r"unknown option '--model'"),
        ("--data.max_broken 2", r"data.max_broken must be between 0 and 1, got 2"),
        ("--data.max_length 0", r"data.max_length must be at least 1"),
        ("--data.path null", r"data.path is missing"),
        ("--data.path a --data.embedded debug", r"exclude each other"),
        ("--model.checkpoint a --model.language_model b", r"exclude each other"),
        ("--deepspeed zero9", r"deepspeed must be zero2, zero3"),
        ("--lora.alpha 8", r"lora\.alpha is set but lora\.r is not"),
        ("--lora.r 0", r"lora\.r must be at least 1"),
        ("--lora.r 8 --lora.targets [", r"lora\.targets: '\[' is no regular expression"),
        ("--lora.r 8 --stage.learn.language_model false", r"leaves the language model out"),
        ("--bits 4", r"add --lora_enable True"),
        ("--bits 3", r"--bits must be 4, 8 or 16, got 3"),
        ("--mm_use_im_start_end True", r"not supported"),
        ("--mm_vision_select_feature cls_patch", r"only 'patch' exists"),
        ("--warmup_ratio 3", r"at least 0 and below 1, got 3"),
        ("stray", r"'stray' belongs to no option"),
        ("--debug maybe", r"--debug takes no value"),
        ("--trainer.global_batch_size 0", r"global_batch_size must be at least 1"),
        ("--trainer.hub_token abc", "set HF_TOKEN"),
    ],
)
def test_mistakes_are_named(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(FINETUNE, shlex.split(words))
    assert "\n" not in str(caught.value)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'uhd_v1/finetune_vicuna7b'"):
        load_recipe("uhd_v1/finetune_vicuna_7b")
    with pytest.raises(UserError, match="unknown recipe"):
        find_recipe("../recipes/uhd_v1/finetune_vicuna7b.yaml.missing")


def test_overrides_of_every_form() -> None:
    words = (
        "--model.image.max_slices=9 --stage.learn.vision_tower 2e-6 --stage.learn.projector true "
        "--stage.learn.language_model false --data.path a.json b.json --run_name 2024 "
        "--trainer.tf32 null --model.language_model.hidden_size 32 --no_cuda --deepspeed my.json "
        "--model.compression.method avgpool1d --trainer.max_grad_norm 1e0 --report_to a b "
        "--trainer.seed 7 --trainer.seed 8"
    )
    recipe = load_recipe(FINETUNE, ["--debug", *shlex.split(words)])
    assert recipe.model.image.max_slices == 9
    assert recipe.stage.learn == {"projector": None, "vision_tower": 2e-6}
    assert recipe.data.path == ["a.json", "b.json"] == recipe.data.paths
    assert isinstance(recipe.model.language_model, dict)
    assert recipe.model.language_model["hidden_size"] == 32
    assert recipe.model.language_model["num_hidden_layers"] == 2
    assert recipe.compression.method == "avgpool1d"
    assert recipe.deepspeed == "my.json"
    arguments = recipe.trainer.arguments
    assert (arguments["run_name"], arguments["tf32"], arguments["use_cpu"]) == ("2024", None, True)
    assert (arguments["max_grad_norm"], arguments["seed"]) == (1.0, 8)
    assert arguments["report_to"] == ["a", "b"]
    replaced = load_recipe(FINETUNE, ["--stage.learn", "{vision_tower: 1e-6}"])
    assert replaced.stage.learn == {"vision_tower": 1e-6}


def test_later_layers_displace_rivals(tmp_path: Path) -> None:
    recipe = load_recipe(FINETUNE, ["--model.checkpoint", "checkpoints/mine"])
    assert recipe.model.language_model is None and recipe.model.vision_tower is None
    assert recipe.model.projector_file is None
    with_tower = ["--model.checkpoint", "c", "--model.vision_tower", "t"]
    assert load_recipe(FINETUNE, with_tower).model.vision_tower == "t"
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: {FINETUNE}\nmodel: {{checkpoint: c}}\n")
    back = load_recipe(file, ["--model_name_or_path", "llm"])
    assert (back.model.checkpoint, back.model.language_model) == (None, "llm")
    accumulated = load_recipe(FINETUNE, ["--gradient_accumulation_steps", "2"])
    assert accumulated.trainer.global_batch_size is None
    assert accumulated.trainer.batch_plan(3) == (4, 2)


def test_another_checkpoint_keeps_what_was_set_beside_the_first() -> None:
    name = "onevision/stage2_si_qwen2_7b"
    own = load_recipe(name).model
    moved = load_recipe(name, ["--model.checkpoint", "elsewhere"]).model
    assert moved.checkpoint == "elsewhere"
    assert moved.image == own.image and moved.given == own.given
    # In the place of parts, it brings its own images.
    parts = load_recipe("onevision/stage1_5_qwen2_7b", ["--model.checkpoint", "elsewhere"]).model
    assert not any(key.startswith("image.") for key in parts.given or ())


def test_bases_and_null(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(
        f"base: {FINETUNE}\ntrainer: {{learning_rate: 1e-4, run_name: one}}\n"
        "model: {projector_file: p.bin}\n"
    )
    (tmp_path / "two.yaml").write_text(
        "base: ./one.yaml\ntrainer: {run_name: null, max_grad_norm: 5}\n"
        "model: {projector_file: null, image: null, compression: {method: avgpool1d, stride: 4}}\n"
        "stage: {learn: {language_model: 1e-6}}\n"
    )
    recipe = load_recipe(tmp_path / "two.yaml")
    assert recipe.name == "two" and recipe.output_dir.endswith("llava-uhd-144-13b")
    assert recipe.trainer.arguments["learning_rate"] == 1e-4
    assert recipe.trainer.arguments["max_grad_norm"] == 5
    assert recipe.trainer.arguments["run_name"] is None
    assert recipe.model.projector_file is None
    assert recipe.stage.learn == {"projector": None, "language_model": 1e-6}
    assert (recipe.compression.method, recipe.compression.stride) == ("avgpool1d", 4)
    (tmp_path / "learn.yaml").write_text("base: one.yaml\nstage: {learn: null}\n")
    with pytest.raises(UserError, match="stage.learn is empty"):
        load_recipe(tmp_path / "learn.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: bad.yaml", "bases run in a circle: bad -> bad"),
        ("base: nowhere", "unknown recipe 'nowhere'"),
        ("base: 3", "base must be a recipe name"),
        ("trainer: {seed: 1, seed: 2}", "key 'seed' stands twice"),
        ("trainer: [1]", "trainer must be a section"),
        ("- a", "must hold sections"),
        ("trainer: {seed: 1", "bad.yaml is not valid YAML"),
        ("trainer: {seed: a}", "bad.yaml: trainer.seed must be a whole number"),
        ("stage: {lern: {}}", "unknown key 'stage.lern'; did you mean 'stage.learn'"),
        ("compression: {}\nmodel: {compression: {}}", "compression stands twice"),
    ],
)
def test_bad_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(tmp_path / "bad.yaml")


def test_recipes_folder_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_UHD_RECIPES", str(tmp_path))
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "mine.yaml").write_text(
        "model: {language_model: a}\ndata: {path: b}\nstage: {learn: {projector: null}}\n"
    )
    assert list_recipes() == ["lab/mine"]
    assert load_recipe("lab/mine").output_dir == "checkpoints/lab/mine"
    monkeypatch.setenv("LLAVA_UHD_RECIPES", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="recipes folder .* does not exist"):
        list_recipes()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("2E5", 2e5),
        (".5", 0.5),
        ("0.", 0.0),
        ("017", 17),
        ("-2", -2),
        ("no", "no"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("True", True),
        ("null", None),
        ("a: b # c", "a: b # c"),
        ("'5'", "5"),
        ("[1, 1e-1]", [1, 0.1]),
        ("[broken", "[broken"),
    ],
)
def test_scalars(text: str, value: object, tmp_path: Path) -> None:
    assert parse_scalar(text) == value and type(parse_scalar(text)) is type(value)
    if text not in ("a: b # c", "[broken"):
        (tmp_path / "x.yaml").write_text(f"key: {text}\n")
        assert load_yaml(tmp_path / "x.yaml") == {"key": value}


def test_words_take_the_type_of_their_field() -> None:
    assert convert(Word("2024"), str, "x") == "2024"
    assert convert(Word("2024"), int, "x") == 2024
    assert convert(Word("null"), str | None, "x") is None
    assert convert(Word("1e3"), int, "x") == 1000
    assert convert([Word("1"), Word("2")], list[float], "x") == [1, 2]
    for value, hint in ((True, int), (True, float), (1, bool), ("1", int), (None, str)):
        with pytest.raises(UserError, match="x must be"):
            convert(value, hint, "x")


@pytest.mark.parametrize(
    ("total", "most", "devices", "plan"),
    [(128, 4, 8, (4, 4)), (128, 4, 1, (4, 32)), (128, 16, 64, (2, 1)), (12, 5, 1, (4, 3))],
)
def test_global_batch_is_kept(total: int, most: int, devices: int, plan: tuple[int, int]) -> None:
    trainer = TrainerConfig(
        global_batch_size=total, arguments={"per_device_train_batch_size": most}
    )
    assert trainer.batch_plan(devices) == plan
    assert plan[0] * plan[1] * devices == total


def test_impossible_batches() -> None:
    with pytest.raises(UserError, match="cannot be shared by 6 devices"):
        TrainerConfig(global_batch_size=128).batch_plan(6)
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    with pytest.raises(UserError, match="leave gradient_accumulation_steps out"):
        TrainerConfig(global_batch_size=128, arguments=arguments).batch_plan(8)
