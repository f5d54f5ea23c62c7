"""Qwen2 and Qwen3 as language models: the library's numbers, batches, folders, ends, debug runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_qwen import QWEN2, QWEN3, save_language_model, save_tokenizer
from fixtures_runs import Train
from fixtures_tiny import VISION, picture
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from llava_uhd.checkpoint.assemble import Assembled, assemble
from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.config.model import CompressionConfig, ImageConfig, ProjectorConfig
from llava_uhd.config.recipe import load_recipe
from llava_uhd.config.training import ModelSection
from llava_uhd.data.demo_tokenizer import build_demo_tokenizer
from llava_uhd.errors import UserError
from llava_uhd.text.encoding import start_ids
from llava_uhd.text.layout import single_token_id
from llava_uhd.text.prompting import prompt_text
from llava_uhd.text.templates import TEMPLATES, Turn

KINDS = {
    "qwen2": QWEN2,
    "qwen2 tied": {**QWEN2, "tie_word_embeddings": True},
    "qwen3": {**QWEN3, "tie_word_embeddings": True},
}
QUESTIONS = ["How many?", "<image>\nWhat does the sign say?", "<image>\nand <image>: which is red?"]
IMAGES = [[], [picture(96, 64)], [picture(20, 30, 1), picture(64, 32, 2)]]
NEW = 8


def make(folder: Path, template: str = "qwen_1_5") -> Assembled:
    """A model of this language model and a tiny tower, through the door that training uses."""
    section = ModelSection(
        language_model=str(folder),
        vision_tower=dict(VISION),
        template=template,
        image=ImageConfig(scale_resolution=32, patch_size=8),
        projector=ProjectorConfig(num_queries=4),
    )
    torch.manual_seed(1)
    made = assemble(section, CompressionConfig(), torch.float32)
    made.model.eval()
    with torch.no_grad():
        for part in (made.model.vision_tower, made.model.projector):
            for parameter in part.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(6.0)
    return made


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = request.param
    return save_language_model(tmp_path_factory.mktemp(name.replace(" ", "_")), KINDS[name])


@pytest.fixture(scope="module")
def made(folder: Path) -> Assembled:
    return make(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def prompts() -> list[str]:
    template = TEMPLATES.get("qwen_1_5")
    return [prompt_text(template, [Turn("human", question)]) for question in QUESTIONS]


def answers(model: Any, processor: Any, texts: list[str], images: list[Any]) -> list[list[int]]:
    inputs = processor(text=texts, images=images)
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


# --- numbers --------------------------------------------------------------------------------------


def test_text_gives_the_logits_of_the_library(folder: Path, made: Assembled) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = ["The red circle, please.\n\nNow", prompts()[0]]
    inputs = made.processor(text=texts)
    assert inputs["attention_mask"][0, 0] != inputs["attention_mask"][1, 0]  # left-padded
    with torch.no_grad():
        wanted = theirs(**inputs, position_ids=None).logits
        found = made.model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert wanted[real].std() > 0.5
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-5, atol=1e-5)
    labels = inputs["input_ids"].masked_fill(~real, -100)
    with torch.no_grad():
        loss, wanted = (model(**inputs, labels=labels).loss for model in (made.model, theirs))
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    settings = {"max_new_tokens": NEW, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(
            made.model.generate(**inputs, **settings), theirs.generate(**inputs, **settings)
        )


def test_batches_equal_single_questions(made: Assembled) -> None:
    alone = [
        answers(made.model, made.processor, [text], [images])[0]
        for text, images in zip(prompts(), IMAGES)
    ]
    assert answers(made.model, made.processor, prompts(), IMAGES) == alone
    assert len({tuple(answer) for answer in alone}) == 3


def test_left_and_right_padding_give_the_same_logits(made: Assembled) -> None:
    rows = []
    for side in ("left", "right"):
        inputs = made.processor(text=prompts(), images=IMAGES, padding_side=side)
        mask = inputs["attention_mask"].bool()
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            rows.append(made.model(**inputs, position_ids=positions).logits[mask])
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-4, atol=1e-4)


# --- folders --------------------------------------------------------------------------------------


def test_save_and_load(made: Assembled, tmp_path: Path) -> None:
    made.model.save_pretrained(tmp_path)
    made.processor.save_pretrained(tmp_path)
    loaded, processor = load_pretrained(tmp_path)
    inputs = made.processor(text=prompts(), images=IMAGES)
    again = processor(text=prompts(), images=IMAGES)
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    with torch.no_grad():
        assert torch.equal(loaded(**again).logits, made.model(**inputs).logits)
    tied = made.model.config.text_config.tie_word_embeddings
    for model in (made.model, loaded):
        head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert (head.data_ptr() == table.data_ptr()) == tied
    stored = load_file(tmp_path / "model.safetensors")
    assert ("language_model.lm_head.weight" not in stored) == tied
    assert (processor.template_name, processor.template_mode) == ("qwen_1_5", "clean")


def test_the_placeholder_is_no_answer(made: Assembled) -> None:
    """Its id lies inside the padded vocabulary of a Qwen model."""
    placeholder = made.processor.image_token_id
    assert placeholder is not None
    head = made.model.get_output_embeddings()
    assert placeholder < head.weight.shape[0] == made.model.config.text_config.vocab_size
    for answer in answers(made.model, made.processor, prompts(), IMAGES):
        assert placeholder not in answer


# --- tokens ---------------------------------------------------------------------------------------


def test_separators_and_start(tokenizer: PreTrainedTokenizerBase, made: Assembled) -> None:
    assert (single_token_id(tokenizer, ","), single_token_id(tokenizer, "\n")) == (11, 198)
    assert start_ids(tokenizer) == []
    image = made.processor.image_config
    assert (image.comma_id, image.newline_id) == (11, 198)
    assert made.model.config.image == image
    # A 2 x 1 grid: two slices of 4 tokens and their separators, then the overview.
    inputs = made.processor(text="<image>", images=[picture(64, 32)], add_special_tokens=False)
    ids = inputs["input_ids"][0].tolist()
    place = made.processor.image_token_id
    assert ids == [place] * 4 + [11] + [place] * 4 + [198] + [place] * 4


def test_separators_of_golden_tokenizers(golden: Path) -> None:
    from transformers import AutoTokenizer

    for folder in ("llava_onevision/tokenizer_qwen", "uhd_v2/full_qwen2"):
        found = AutoTokenizer.from_pretrained(golden / folder)
        assert (single_token_id(found, ","), single_token_id(found, "\n")) == (11, 198)


# --- where answers end ----------------------------------------------------------------------------


def test_answers_end_at_the_template_token(tmp_path: Path) -> None:
    """Qwen2 without "Instruct" names another token as its end."""
    folder = save_language_model(tmp_path / "base", QWEN2, eos="<|endoftext|>")
    made = make(folder)
    ids = made.processor.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert made.model.generation_config.eos_token_id == ids
    made.model.save_pretrained(tmp_path / "saved")
    made.processor.save_pretrained(tmp_path / "saved")
    assert load_pretrained(tmp_path / "saved")[0].generation_config.eos_token_id == ids
    instruct = make(save_language_model(tmp_path / "instruct", QWEN2))
    assert instruct.model.generation_config.eos_token_id == ids[1]
    assert make(folder, "v1").model.generation_config.eos_token_id == ids[0]


def test_several_ends_of_a_generation_config(made: Assembled, tmp_path: Path) -> None:
    made.model.save_pretrained(tmp_path)
    made.processor.save_pretrained(tmp_path)
    free = answers(made.model, made.processor, prompts(), IMAGES)
    # Every row has its own end, somewhere inside.
    ends = [row[place] for row, place in zip(free, (2, 4, 3))]
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": ends}))
    model, processor = load_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == ends
    pad = processor.tokenizer.pad_token_id
    inputs = processor(text=prompts(), images=IMAGES)
    found = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    for row, whole in zip(found[:, inputs["input_ids"].shape[1] :].tolist(), free):
        stop = min(whole.index(end) for end in ends if end in whole) + 1
        assert stop < NEW
        assert row == whole[:stop] + [pad] * (len(row) - stop)


# --- debug runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["uhd_v1/pretrain_vicuna7b", "uhd_v2/finetune_vicuna7b"])
def test_debug_run_keeps_the_kinds_of_parts(train: Train, workplace: Path, base: str) -> None:
    name = base.replace("/", "_")
    recipe = workplace / f"{name}.yaml"
    recipe.write_text(
        f"base: {base}\n"
        "model:\n  template: qwen_1_5\n  language_model: pretrained_models/Qwen2-7B-Instruct\n"
        "  vision_tower: pretrained_models/siglip-so400m-patch14-384\n"
        "debug_base: [_base/debug_qwen2, _base/debug_siglip]\n"
    )
    folder = train(str(recipe), f"out/{name}", "--debug", "--trainer.max_steps", "1")
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["model_type"] == "qwen2"
    assert config["vision_config"]["model_type"] == "siglip_vision_model"
    assert config["image"]["mean"] == [0.5, 0.5, 0.5]
    model, processor = load_pretrained(folder)
    assert processor.template_name == "qwen_1_5"
    single = processor.tokenizer.get_added_vocab()
    end = single["<|im_end|>"]
    assert "<|im_start|>" in single
    assert end < model.config.text_config.vocab_size
    assert end in model.generation_config.eos_token_id
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert any(entry.get("loss", 0) > 0 for entry in entries)


def test_debug_bases_are_laid_over_in_order(tmp_path: Path) -> None:
    words = ["--debug", "--debug_base", "_base/debug_qwen2", "_base/debug_siglip"]
    recipe = load_recipe("uhd_v1/finetune_vicuna7b", words)
    kinds = [
        part["model_type"] if isinstance(part, dict) else part
        for part in (recipe.model.language_model, recipe.model.vision_tower)
    ]
    assert kinds == ["qwen2", "siglip_vision_model"]
    assert recipe.debug_base == words[2:]
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml", debug=True) == recipe
    # Without --debug the key says only what would be.
    assert load_recipe("uhd_v1/finetune_vicuna7b", words[1:]).debug is False
    own = [*words, "--model.language_model", "models/mine"]
    assert load_recipe("uhd_v1/finetune_vicuna7b", own).model.language_model == "models/mine"
    with pytest.raises(UserError, match="unknown recipe '_base/debug_qwen9'"):
        load_recipe("uhd_v1/finetune_vicuna7b", ["--debug", "--debug_base", "_base/debug_qwen9"])


def test_the_demo_tokenizer_is_the_same_without_marks() -> None:
    tokenizer = build_demo_tokenizer()
    assert not {"<|im_start|>", "<|im_end|>"} & set(tokenizer.get_vocab())
