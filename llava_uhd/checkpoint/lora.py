"""Output folders of LoRA training, ours and published: an adapter beside a base.

A folder holds the adapter as PEFT writes it and, in a second file, whatever else learned (the
projector above all). Everything else is in the base, which the folder names: a language model, or
a whole multimodal checkpoint. What a folder is, its files say, never its name.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from llava_uhd.checkpoint.lora_base import (
    KIND,
    LEARNED_FILE,
    LoraFiles,
    Opened,
    Source,
    Wanted,
    base_folder,
    is_multimodal,
    learned_file,
    make_adapter,
    our_names,
    read_files,
    recorded_path,
    with_tower,
)
from llava_uhd.checkpoint.lora_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    read_fingerprint,
)
from llava_uhd.checkpoint.lora_layers import (
    Adapter,
    check_fit,
    fingerprint,
    merge_adapter,
    other_base,
)
from llava_uhd.checkpoint.lora_published import open_published_lora, published_names
from llava_uhd.checkpoint.manifest import read_manifest
from llava_uhd.checkpoint.parts import (
    read_language_model,
    read_model_config,
    read_processor,
)
from llava_uhd.checkpoint.published import (
    find_layout,
)
from llava_uhd.checkpoint.sources import PUBLISHED_LEARNED_FILE, resolve_folder
from llava_uhd.checkpoint.weights import (
    Tensors,
    read_tensors,
    weight_files,
)
from llava_uhd.config.model import LlavaUHDConfig

logger = logging.getLogger(__name__)


def is_lora(folder: Path) -> bool:
    """Whether a folder holds an adapter and not the weights of a whole model."""
    marks = (ADAPTER_CONFIG, *ADAPTER_FILES, LEARNED_FILE, PUBLISHED_LEARNED_FILE)
    marked = any((folder / name).is_file() for name in marks)
    if not marked and read_manifest(folder).get("kind") != KIND:
        return False
    return not weight_files(folder)


def open_lora(folder: Path, wanted: Wanted) -> tuple[Opened, Adapter]:
    """What a LoRA folder means: its base with everything else that learned, and the adapter.

    Args:
        folder: see `is_lora`.
        wanted: where its base is.

    Returns:
        Configuration, unmerged weights and processor; and the adapter, under the model's names.

    Raises:
        UserError: a missing file or base, or an adapter that does not fit the base.
    """
    files = read_files(folder)
    return _open_ours(files, wanted) if files.ours else open_published_lora(files, wanted)


def read_adapter(path: str | Path, config: LlavaUHDConfig) -> tuple[Adapter, Tensors]:
    """A trained adapter without its base, and what else learned with it, for a model at hand.

    Args:
        path: LoRA folder, ours or published, or hub id.
        config: of the model.

    Raises:
        UserError: no such folder, missing files, or weights that such a model does not have.
    """
    files = read_files(resolve_folder(path, "adapter"))
    found = dict(read_tensors(learned_file(files)))
    learned = files.extra | found if files.ours else published_names(files, found)
    layout = None if files.ours else find_layout(files.values, learned)
    return make_adapter(files, config, layout), our_names(files, learned, config, layout)


def merged(opened: Opened, adapter: Adapter, dtype: torch.dtype | None = None) -> Opened:
    """The whole model of what `open_lora` gives.

    Args:
        opened: base with everything else that learned.
        adapter: of `open_lora`.
        dtype: of the merged weights; None keeps the base's.
    """
    config, state, processor = opened
    return config, merge_adapter(adapter, state, dtype), processor


def _open_ours(files: LoraFiles, wanted: Wanted) -> tuple[Opened, Adapter]:
    folder = files.folder
    config = read_model_config(folder)
    adapter = make_adapter(files, config, None)
    learned = dict(read_tensors(learned_file(files)))
    learned |= our_names(files, files.extra, config, None)
    facts = read_manifest(folder)
    state: Tensors = {}
    tower: Source = wanted.vision_tower
    recorded_tower = recorded_path(facts.get("vision_tower"))
    where = folder
    # A model that began from nothing lies whole beside its adapter.
    if any(f"{name}.weight" not in learned for name in adapter.layers):
        recorded = facts.get("checkpoint") or facts.get("language_model")
        recorded = recorded or files.settings.get("base_model_name_or_path")
        where = base_folder(files, wanted, recorded)
        if is_multimodal(where):
            if wanted.base is None:
                tower = tower or recorded_tower
            _, state, _ = wanted.open_whole(where, None, tower)
        else:
            state = read_language_model(where)
    state |= learned
    check_fit(adapter, state, f"{where}")
    if other_base(read_fingerprint(folder), fingerprint(state)):
        logger.warning(
            "the adapter %s was trained on another model of this shape than %s: its answers will "
            "be wrong; pass base=FOLDER",
            folder,
            where,
        )
    absent = not any(name.startswith("vision_tower.") for name in state)
    if wanted.vision_tower is not None or absent:
        state = with_tower(files, config, state, tower or recorded_tower)
    return (config, state, read_processor(folder)), adapter
