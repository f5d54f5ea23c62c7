"""Tokenizer files as published checkpoints have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llava_uhd.checkpoint.manifest import write_whole
from llava_uhd.checkpoint.parts import read_tokenizer
from llava_uhd.errors import UserError
from llava_uhd.text.templates import IMAGE_MARKER

TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)

# Written by newer libraries, unknown to the published ones.
_NEW_SETTINGS = ("backend", "is_local", "local_files_only", "processor_class", "image_token")


def write_tokenizer(
    out: Path, tokenizer: PreTrainedTokenizerBase, source: Path | None, model_type: str
) -> list[str]:
    """Writes the tokenizer of a published checkpoint: without our image placeholder.

    Args:
        out: existing folder.
        tokenizer: of the model.
        source: folder whose tokenizer files are copied as they are (`check_tokenizer`), or None.
        model_type: of the language model.

    Returns:
        A note where the published code lacks a file.
    """
    if source is not None:
        for file in _files(source):
            shutil.copyfile(file, out / file.name)
    else:
        _write_own(out, tokenizer, model_type)
    if model_type == "llama" and not (out / "tokenizer.model").is_file():
        return [
            "the published code reads Llama tokenizers from tokenizer.model, which is not at hand: "
            "copy the language model's there, or pass its folder with --tokenizer"
        ]
    return []


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a folder without a tokenizer, or with another one."""
    if not holds_tokenizer(folder, tokenizer):
        raise UserError(
            f"{folder} has no tokenizer files ({', '.join(TOKENIZER_FILES[:3])}), or those of "
            "another vocabulary: name the folder of the model's own language model"
        )


def holds_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a folder has files of a tokenizer with the same words, beside our placeholder."""
    if not _files(folder):
        return False
    try:
        other = read_tokenizer(folder)
    except UserError:
        return False
    first, second = ({**each.get_vocab()} for each in (tokenizer, other))
    for words in (first, second):
        words.pop(IMAGE_MARKER, None)
    return first == second


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def _write_own(out: Path, tokenizer: PreTrainedTokenizerBase, model_type: str) -> None:
    tokenizer.save_pretrained(out)
    (out / "chat_template.jinja").unlink(missing_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        path = out / name
        if not path.is_file():
            continue
        values = _without_marker(json.loads(path.read_text(encoding="utf-8")))
        if name == "tokenizer_config.json":
            values = {key: each for key, each in values.items() if key not in _NEW_SETTINGS}
            if "extra_special_tokens" in values:
                values["additional_special_tokens"] = values.pop("extra_special_tokens")
            values["added_tokens_decoder"] = _added_tokens(tokenizer)
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        write_whole(path, text)
    if model_type != "llama":
        backend: Any = tokenizer
        backend.backend_tokenizer.model.save(str(out))  # vocab.json and merges.txt


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
    """Tokens beside the vocabulary, with the ids that they must keep."""
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    table = getattr(tokenizer, "added_tokens_decoder", {})
    return {
        str(index): {name: getattr(token, name) for name in names}
        for index, token in sorted(table.items())
        if token.content != IMAGE_MARKER
    }


def _without_marker(value: Any) -> Any:
    """A tokenizer file's values without the image placeholder."""
    if isinstance(value, list):
        return [_without_marker(each) for each in value if not _is_marker(each)]
    if isinstance(value, dict):
        return {key: _without_marker(each) for key, each in value.items() if not _is_marker(each)}
    return value


def _is_marker(value: Any) -> bool:
    content = value.get("content") if isinstance(value, dict) else value
    return content == IMAGE_MARKER
