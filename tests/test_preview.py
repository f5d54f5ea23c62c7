"""What is shown before a run, and which runs are refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures_model import call
from fixtures_tiny import picture, tiny_parts
from rich.console import Console

from llava_uhd.config.training import DataConfig
from llava_uhd.data.dataset import ConversationDataset, open_records
from llava_uhd.errors import UserError
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.train.preview import check_template, preview, spread


def write(folder: Path, answers: list[str], **record: Any) -> DataConfig:
    picture(60, 40).save(folder / "a.png")
    rows = [
        {
            "id": f"r{index}",
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": answer},
            ],
        }
        for index, answer in enumerate(answers)
    ]
    (folder / "data.json").write_text(json.dumps(rows))
    return DataConfig(path=str(folder / "data.json"), image_folder=str(folder), **record)


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., ConversationDataset]:
    def make(answers: list[str], mode: str = "clean", **options: Any) -> ConversationDataset:
        _, processor = tiny_parts()
        processor.template_mode = mode
        config = write(tmp_path, answers, **options)
        return ConversationDataset(open_records(config), processor, config)

    return make


def shown(data: ConversationDataset) -> str:
    out = io.StringIO()
    preview(data, Console(file=out, width=2000, force_terminal=False))
    return out.getvalue()


def test_learned_tokens_are_marked(dataset: Callable[..., ConversationDataset]) -> None:
    """Answers and their end tokens; images in short; no more samples than asked for."""
    text = shown(dataset(["red sign", "blue", "green"], preview=2))
    assert "[[ red sign</s>]]" in text and "[[ blue</s>]]" in text and "green" not in text
    tokens = tiny_parts()[1].num_image_tokens(60, 40)
    assert f"<image: {tokens} tokens>" in text or "<image:" in text
    assert "3 samples checked" in text and "0 have no learned token" in text
    assert "[[" not in shown(dataset(["red"], preview=0))


def test_samples_without_a_learned_token_are_refused(
    dataset: Callable[..., ConversationDataset],
) -> None:
    """The published check masks a sample whose answer is empty; half of them is too much."""
    data = dataset(["red", "", "", "blue"], mode="faithful", max_unlearned=0.4)
    with pytest.raises(UserError, match="data.json, record 1") as error:
        shown(data)
    assert "2 of 4" in str(error.value) and "What is it?" in str(error.value)
    shown(dataset(["red", "", "", "blue"], mode="faithful", max_unlearned=0.5))
    shown(dataset(["red", "", "", "blue"], max_unlearned=0.0))


def test_answers_that_are_cut_off_are_refused(
    dataset: Callable[..., ConversationDataset],
) -> None:
    whole = dataset(["red"])
    length = whole.token_length(0)
    with pytest.raises(UserError, match="max_length"):
        shown(dataset(["red"], max_length=length - 3, overlong="drop"))


def test_a_template_of_another_tokenizer_is_refused() -> None:
    """Its marks would be spelt out in pieces, and generation would never end."""
    _, plain = tiny_parts()
    wrong = LlavaUHDProcessor(
        plain.tokenizer, plain.to_dict()["image_config"], {"num_queries": 4}, "qwen_1_5"
    )
    with pytest.raises(UserError, match=r"template 'qwen_1_5' does not fit .*<\|im_end\|>"):
        check_template(wrong)
    check_template(plain)


def test_even_places() -> None:
    assert spread(10, 4) == [0, 2, 5, 7] and spread(3, 64) == [0, 1, 2]


def test_as_typed(tmp_path: Path) -> None:
    """The command shows without training, and a refused run says so in one line."""
    write(tmp_path, ["red", "blue"])
    words = (
        "llava_1_5/finetune_vicuna7b",
        "--debug",
        "--data.path",
        "data.json",
        "--data.image_folder",
        ".",
    )
    status, out, error = call("llava_uhd.train.preview", *words, cwd=tmp_path)
    assert status == 0 and "[[" in out, error
    assert not (tmp_path / "checkpoints").exists()
