"""Tokenizer files as published checkpoints have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from llava_uhd.checkpoint.manifest import write_whole
from llava_uhd.checkpoint.parts import read_tokenizer
from llava_uhd.errors import UserError
from llava_uhd.text.templates import IMAGE_MARKER, VIDEO_MARKER

TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)

# Classes by the language model's type, under names that all releases of the library know.
TOKENIZER_CLASSES = {
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}

# Key of tokenizer_config.json: what `start_words_everywhere` replaced.
WORD_STARTS = "original_word_starts"
_WORD = "\u2581"

_ANY_CLASS = "PreTrainedTokenizerFast"

# Written by newer libraries, unknown to the published ones.
_NEW_SETTINGS = {
    *("backend", "is_local", "local_files_only", "processor_class"),
    *("image_token", "video_token"),
}

# Our placeholders, which the published code has no tokens for.
_MARKERS = frozenset((IMAGE_MARKER, VIDEO_MARKER))

# Read from tokenizer.model by the published code.
_PIECES = ("llama", "mistral")


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
    if model_type in _PIECES and not (out / "tokenizer.model").is_file():
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
        for marker in _MARKERS:
            words.pop(marker, None)
    return first == second


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def _write_own(out: Path, tokenizer: PreTrainedTokenizerBase, model_type: str) -> None:
    tokenizer.save_pretrained(out)
    (out / "chat_template.jinja").unlink(missing_ok=True)
    strip = _removable(tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        path = out / name
        if not path.is_file():
            continue
        values = _without(strip, json.loads(path.read_text(encoding="utf-8")))
        if name == "tokenizer_config.json":
            values = {key: each for key, each in values.items() if key not in _NEW_SETTINGS}
            others = values.pop("extra_special_tokens", None)
            if others is not None:
                listed = others.values() if isinstance(others, dict) else others
                values["additional_special_tokens"] = list(listed)
            values["added_tokens_decoder"] = _without(strip, added_tokens(tokenizer))
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        write_whole(path, text)
    settle_class(out, tokenizer, model_type)
    if model_type not in _PIECES:
        backend: Any = tokenizer
        backend.backend_tokenizer.model.save(str(out))  # vocab.json and merges.txt


# Special tokens, spaces, bytes, and text that follows them.
_SAMPLE = "A  first\n line, {end}then{end} more\t: 12,345 \u00e4\u4e2d {end} done.{begin}"


def settle_class(out: Path, tokenizer: PreTrainedTokenizerBase, model_type: str) -> None:
    """Names a class in ``tokenizer_config.json`` that every release of the library knows.

    Newer releases build some classes anew instead of reading ``tokenizer.json``: the usual class of
    the language model is only named if it gives the same ids.

    Args:
        out: folder with the tokenizer's files, and the model's ``config.json``.
        tokenizer: that was written.
        model_type: of the language model.
    """
    path = out / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    begin, end = tokenizer.bos_token or "", tokenizer.eos_token or ""
    sample = _SAMPLE.format(begin=begin, end=end)
    for name in (TOKENIZER_CLASSES.get(model_type), _ANY_CLASS):
        if name is None:
            continue
        values["tokenizer_class"] = name
        write_whole(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        if read_tokenizer(out)(sample)["input_ids"] == tokenizer(sample)["input_ids"]:
            return


def start_words_everywhere(tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes a Llama tokenizer mark a word's start behind every token of its own, in place.

    Tokenizers of newer releases do it at the beginning of a text only. What was there before is
    kept under `WORD_STARTS`; other tokenizers stay as they are.
    """
    backend: Any = tokenizer
    core = backend.backend_tokenizer
    state = json.loads(core.to_str())
    parts = [state.get("pre_tokenizer") or {}]
    found = False
    while parts:
        part = parts.pop()
        parts += part.get("pretokenizers", [])
        found |= part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first"
    if not found:
        return
    tokenizer.init_kwargs |= {
        "legacy": True,
        WORD_STARTS: json.dumps({key: state[key] for key in ("normalizer", "pre_tokenizer")}),
    }
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _WORD}
    steps = [{"type": "Prepend", "prepend": _WORD}, spaces]
    _set_steps(core, {"normalizer": {"type": "Sequence", "normalizers": steps}})


def restore_word_starts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Undoes `start_words_everywhere` in a tokenizer that was read from such a folder, in place."""
    old = tokenizer.init_kwargs.pop(WORD_STARTS, None)
    if old is not None:
        backend: Any = tokenizer
        _set_steps(backend.backend_tokenizer, json.loads(str(old)))
        tokenizer.init_kwargs["legacy"] = False


def _set_steps(core: Tokenizer, steps: dict[str, Any]) -> None:
    """Replaces normaliser and pre-tokeniser, by their serialised forms."""
    state = json.loads(core.to_str())
    for key in ("normalizer", "pre_tokenizer"):
        state[key] = steps.get(key)
    made = Tokenizer.from_str(json.dumps(state))
    core.normalizer, core.pre_tokenizer = made.normalizer, made.pre_tokenizer


def _removable(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Markers that no other token follows: without them the others keep their ids.

    A checkpoint of transformers may have a padding token behind its placeholder. Then it stays,
    which the published code does not mind: it cuts the text at the marker before it reads tokens.
    """
    words = tokenizer.get_vocab()
    own = {words[marker] for marker in _MARKERS if marker in words}
    last = max((index for word, index in words.items() if word not in _MARKERS), default=-1)
    return _MARKERS if not own or min(own) > last else frozenset()


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
    """Tokens beside the vocabulary, with the ids that they must keep."""
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    table = getattr(tokenizer, "added_tokens_decoder", {})
    return {
        str(index): {name: getattr(token, name) for name in names}
        for index, token in sorted(table.items())
    }


def _without(words: frozenset[str], value: Any) -> Any:
    """A tokenizer file's values without some tokens."""

    def dropped(item: Any) -> bool:
        content = item.get("content") if isinstance(item, dict) else item
        return isinstance(content, str) and content in words

    if isinstance(value, list):
        return [_without(words, each) for each in value if not dropped(each)]
    if isinstance(value, dict):
        return {key: _without(words, each) for key, each in value.items() if not dropped(each)}
    return value
