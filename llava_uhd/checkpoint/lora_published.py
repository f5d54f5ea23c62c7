"""LoRA folders as the published training of LLaVA and its family writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_uhd.checkpoint.lora_base import (
    LoraFiles,
    Opened,
    Source,
    Wanted,
    base_folder,
    is_multimodal,
    learned_file,
    make_adapter,
    our_names,
    read_vision,
    recorded_path,
    with_tower,
)
from llava_uhd.checkpoint.lora_layers import Adapter, base_name, check_fit
from llava_uhd.checkpoint.parts import read_language_model
from llava_uhd.checkpoint.published import find_layout, find_tower
from llava_uhd.checkpoint.published.values import FAMILIES, family
from llava_uhd.checkpoint.published_folder import has_tokenizer, published_processor
from llava_uhd.checkpoint.weights import Tensors, read_json, read_tensors, weight_names
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.text.processor import LlavaUHDProcessor


def open_published_lora(files: LoraFiles, wanted: Wanted) -> tuple[Opened, Adapter]:
    """A published LoRA folder with its base; see `llava_uhd.checkpoint.lora.open_lora`."""
    folder, values = files.folder, files.values
    learned = published_names(files, dict(read_tensors(learned_file(files))))
    recorded = files.settings.get("base_model_name_or_path") or values.get("_name_or_path")
    base = base_folder(files, wanted, recorded)
    own: LlavaUHDConfig | None = None
    own_processor: LlavaUHDProcessor | None = None
    names = list(learned)
    if is_multimodal(base):
        own, state, own_processor = wanted.open_whole(base, None, wanted.vision_tower)
        names += weight_names(base)
    else:
        state = read_language_model(base)
    values = _with_family(values, base, own)
    layout = find_layout(values, names)
    if layout is None:
        raise UserError(
            f"{folder}/config.json has model_type '{values.get('model_type')}' and projector "
            f"'{values.get('mm_projector_type')}': not a model that loads here"
        )
    tower: Source = wanted.vision_tower
    if own is None and tower is None:
        tower = find_tower(values, folder) or recorded_path(values.get("mm_vision_tower"))
    vision = read_vision(files, tower) if tower else own.vision_config if own else None
    if vision is None:
        raise UserError(f"{folder}/config.json names no mm_vision_tower: pass vision_tower=FOLDER")
    try:
        config = layout.make_config(layout.complete(values, folder), vision, names)
    except UserError as error:
        raise UserError(f"{folder}/config.json: {error}") from error
    adapter = make_adapter(files, config, layout)
    state |= our_names(files, learned, config, layout)
    check_fit(adapter, state, f"{base}")
    absent = not any(name.startswith("vision_tower.") for name in state)
    if wanted.vision_tower is not None or absent:
        state = with_tower(files, config, state, tower)
    if own_processor is not None and not has_tokenizer(folder):
        processor = LlavaUHDProcessor.from_parts(own_processor.tokenizer, config)
    else:
        processor = published_processor(folder if has_tokenizer(folder) else base, config)
    return (config, state, processor), adapter


def published_names(files: LoraFiles, found: Tensors) -> Tensors:
    """What learned beside the adapter, without what the trainer's wrappers put before the names.

    Example: ``base_model.model.model.mm_projector.0.weight`` is ``model.mm_projector.0.weight``.
    """
    bare = {base_name(key.removeprefix("base_model.")): tensor for key, tensor in found.items()}
    if any(key.startswith("model.model.") for key in bare):
        bare = {key.removeprefix("model."): tensor for key, tensor in bare.items()}
    return files.extra | bare


def _with_family(values: dict[str, Any], base: Path, own: LlavaUHDConfig | None) -> dict[str, Any]:
    """The values with a class that says which language model there is.

    The published training leaves the class of the plain language model in ``config.json``.
    """
    if own is not None:
        language = own.text_config.model_type
    else:
        language = read_json(base / "config.json").get("model_type")
    if family(values) is not None or language not in FAMILIES:
        return values
    return {**values, "architectures": [FAMILIES[language][0]]}
