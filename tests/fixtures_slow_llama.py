"""The slow Llama tokenizer of the published code, and fast ones that must write the same ids."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase


class SlowLlama:
    """The slow Llama tokenizer of transformers 4.37, from its description, over sentencepiece.

    Special tokens in the text are split off. Every piece between them goes through sentencepiece:
    with its dummy prefix (legacy), or without, except at the start of the text (not legacy).
    """

    def __init__(self, model: Path, legacy: bool) -> None:
        import sentencepiece

        self.legacy = legacy
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self.special = {"<unk>": 0, "<s>": 1, "</s>": 2}

    def pieces(self, text: str, prefix: bool) -> list[int]:
        if prefix:
            return list(self.model.encode(text))
        # The piece "<unk>" keeps sentencepiece from adding its prefix; its own pieces are cut off.
        head = self.model.encode("<unk>")
        whole = self.model.encode("<unk>" + text)
        assert whole[: len(head)] == head
        return list(whole[len(head) :])

    def __call__(self, text: str) -> list[int]:
        ids = [1]
        for place, part in enumerate(re.split("(<unk>|<s>|</s>)", text)):
            if part in self.special:
                ids.append(self.special[part])
            elif part:
                ids += self.pieces(part, prefix=self.legacy or place == 0)
        return ids

    def with_images(self, text: str) -> list[int]:
        """Chunks between images on their own; the first begin token is kept, -200 for an image."""
        ids = self(text.split("<image>")[0])
        for chunk in text.split("<image>")[1:]:
            ids += [-200, *self(chunk)[1:]]
        return ids


Pair = tuple[PreTrainedTokenizerBase, SlowLlama]


@pytest.fixture(scope="module", name="converted")
def convert_tokenizers(
    golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[bool], Pair]:
    """The golden tokenizer with the named treatment of text behind ``</s>``, fast and slow."""
    source = golden / "uhd_v1/tiny_checkpoint"
    made: dict[bool, Pair] = {}

    def make(legacy: bool) -> Pair:
        if legacy not in made:
            folder = tmp_path_factory.mktemp(f"legacy_{legacy}")
            shutil.copy(source / "tokenizer.model", folder)
            values = json.loads((source / "tokenizer_config.json").read_text())
            values["legacy"] = legacy
            (folder / "tokenizer_config.json").write_text(json.dumps(values))
            fast = AutoTokenizer.from_pretrained(folder)
            made[legacy] = fast, SlowLlama(folder / "tokenizer.model", legacy)
        return made[legacy]

    return make
