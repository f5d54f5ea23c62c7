"""The parts of a model as they lie on disk: language model, vision tower, projector."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as library_logging

from llava_uhd.checkpoint.projector_names import our_projector_key
from llava_uhd.checkpoint.sources import resolve_folder
from llava_uhd.checkpoint.weights import (
    Tensors,
    check_state,
    first_line,
    read_folder,
    read_json,
    read_tensors,
    weight_files,
)
from llava_uhd.config.model import LlavaUHDConfig, ProjectorConfig, make_config
from llava_uhd.errors import UserError
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.vision.towers import TOWERS, VisionTower, num_built_layers

logger = logging.getLogger(__name__)

PROJECTOR_FILE = "projector.safetensors"
PUBLISHED_PROJECTOR_FILE = "mm_projector.bin"
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


@contextmanager
def quiet_library() -> Iterator[None]:
    """Silences what transformers tells while it loads, except errors."""
    level = library_logging.get_verbosity()
    library_logging.set_verbosity_error()
    try:
        yield
    finally:
        library_logging.set_verbosity(level)


def tower_key(key: str, depth: int) -> str | None:
    """Our name of a transformers vision-tower weight, or None if the tower does not use it.

    Args:
        key: without the ``vision_model.`` prefix, for instance ``encoder.layers.0.mlp.fc1.weight``.
        depth: layers that are built; later ones are not used, nor is the norm behind them.
    """
    if key.startswith(("post_layernorm.", "head.")) or key.endswith("position_ids"):
        return None
    layer = _LAYER.match(key)
    if layer and int(layer.group(1)) >= depth:
        return None
    return key.removeprefix("encoder.")


def read_tower_config(folder: Path) -> PreTrainedConfig:
    """Vision configuration of a transformers folder (a tower alone, or a whole CLIP model).

    ``image_mean`` and ``image_std`` of a ``preprocessor_config.json`` beside it become part of it.

    Raises:
        UserError: not a folder of a known tower.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"vision tower {folder} has no config.json: name a folder as transformers writes it "
            "(see pretrained_models/README.md)"
        )
    values = read_json(folder / "config.json")
    if isinstance(values.get("vision_config"), dict):
        values = dict(
            values["vision_config"], model_type=f"{values.get('model_type')}_vision_model"
        )
    model_type = str(values.pop("model_type", "none"))
    if model_type not in TOWERS:
        raise UserError(
            f"vision tower {folder} is a '{model_type}', not one of {', '.join(TOWERS.names())}"
        )
    for key in ("torch_dtype", "dtype", "architectures"):
        values.pop(key, None)
    if (folder / "preprocessor_config.json").is_file():
        seen = read_json(folder / "preprocessor_config.json")
        values |= {key: seen[key] for key in ("image_mean", "image_std") if seen.get(key)}
    return make_config({**values, "model_type": model_type}, f"vision tower {folder}")


def read_tower(folder: Path, config: PreTrainedConfig, select_layer: int) -> Tensors:
    """Weights of a tower folder under the model's names (``vision_tower.*``)."""
    depth = num_built_layers(config.num_hidden_layers, select_layer)
    state: Tensors = {}
    for key, tensor in read_folder(folder).items():
        if key.startswith(("text_model.", "logit_", "text_projection", "visual_projection")):
            continue
        ours = tower_key(key.removeprefix("vision_model."), depth)
        if ours is not None:
            state[f"vision_tower.{ours}"] = tensor
    return state


def open_tower(path: str | Path, select_layer: int) -> VisionTower:
    """A vision tower alone, with its weights in float32, in evaluation mode.

    Args:
        path: folder or hub id.
        select_layer: hidden state that is returned.

    Raises:
        UserError: missing folder, or weights that do not fit.
    """
    folder = resolve_folder(path, "vision tower")
    config = read_tower_config(folder)
    state = {
        name.removeprefix("vision_tower."): tensor.float()
        for name, tensor in read_tower(folder, config, select_layer).items()
    }
    with torch.device("meta"):
        tower = VisionTower(config, select_layer)
    check_state(tower, state, f"vision tower {folder}")
    tower.load_state_dict(state, assign=True)
    return tower.eval()


def read_language_config(folder: Path) -> PreTrainedConfig:
    """Configuration of a language-model folder, without its storage dtype."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise UserError(
            f"language model {folder}: its config.json is not usable ({first_line(error)})"
        ) from error
    config.dtype = None
    return config


def read_language_model(folder: Path) -> Tensors:
    """Weights of a causal-language-model folder under the model's names (``language_model.*``)."""
    return {
        f"language_model.{key}": tensor
        for key, tensor in read_folder(folder).items()
        if not key.endswith("rotary_emb.inv_freq")
    }


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Fast tokenizer of a folder, with the published padding token.

    Raises:
        UserError: no usable tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        with warnings.catch_warnings(), quiet_library():
            # It reads the model's config.json too, and comments on keys of older releases there.
            warnings.simplefilter("ignore", FutureWarning)
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} has no usable tokenizer ({first_line(error)}): tokenizer.json or "
            "tokenizer.model and tokenizer_config.json must lie there"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def read_processor(folder: Path) -> LlavaUHDProcessor:
    """Processor of a folder of ours.

    Raises:
        UserError: it is missing or not usable.
    """
    # Without this file the library would make a processor with default settings.
    read_json(folder / "processor_config.json")
    try:
        return LlavaUHDProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} has no usable processor ({first_line(error)})") from error


def read_model_config(folder: Path) -> LlavaUHDConfig:
    """Configuration of a folder of ours, without its storage dtype.

    Raises:
        UserError: its ``config.json`` is missing or not usable.
    """
    read_json(folder / "config.json")
    try:
        config = LlavaUHDConfig.from_pretrained(folder)
    except UserError as error:
        raise UserError(f"{folder}/config.json: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{folder}/config.json is not usable ({first_line(error)})") from error
    config.dtype = None
    return config


def projector_facts(config: LlavaUHDConfig) -> dict[str, Any]:
    """What a projector file must agree on with the model it is loaded into."""
    options: ProjectorConfig = config.projector
    facts = {
        "type": options.type,
        "num_queries": options.num_queries,
        "vision_width": config.vision_config.hidden_size,
        "width": config.hidden_size,
        "select_layer": config.select_layer,
    }
    if options.type == "hiwin":
        facts["scales"] = list(options.scales)
    return facts


def save_projector(path: Path, state: Tensors, config: LlavaUHDConfig) -> None:
    """Writes a projector with the facts that a later load verifies.

    Args:
        path: of the ``.safetensors`` file.
        state: tensors under ``projector.*`` or bare names.
        config: of the model.
    """
    tensors = {
        key.removeprefix("projector."): tensor.detach().cpu().contiguous()
        for key, tensor in state.items()
    }
    facts = {
        "format": "pt",
        "llava_uhd_projector": json.dumps(projector_facts(config)),
        "projector_config": json.dumps(dataclasses.asdict(config.projector)),
    }
    save_file(tensors, path, metadata=facts)


def find_projector(path: Path) -> Path:
    """Projector file of a first-stage output folder, or the file itself.

    A folder that holds a whole model, ours or published, is returned as it is: the projector is in
    it.

    Raises:
        UserError: there is none.
    """
    if path.is_file():
        return path
    for name in (PROJECTOR_FILE, PUBLISHED_PROJECTOR_FILE):
        if (path / name).is_file():
            return path / name
    if path.is_dir() and weight_files(path):
        values = read_json(path / "config.json")
        if values.get("model_type") == "llava_uhd" or "mm_projector_type" in values:
            return path
    raise UserError(
        f"{path} has no projector ({PROJECTOR_FILE} or {PUBLISHED_PROJECTOR_FILE}): run the first "
        "stage (bash pretrain.sh), or set model.projector_file to its output folder"
    )


def read_projector(path: Path, config: LlavaUHDConfig) -> Tensors:
    """Weights of a projector file, ours or published, under the model's names.

    Raises:
        UserError: the file was made for another projector, tower or language model.
    """
    file = find_projector(path)
    if file.is_dir():
        if read_json(file / "config.json").get("model_type") == "llava_uhd":
            _check_facts(file, projector_facts(read_model_config(file)), config)
            return read_folder(file, lambda key: key.startswith("projector."))
        return _published_projector(
            read_folder(file, lambda key: key.startswith("model.mm_projector.")), config
        )
    tensors = dict(read_tensors(file))
    if file.suffix != ".safetensors":
        return _published_projector(tensors, config)
    with safe_open(file, framework="pt") as opened:
        facts = json.loads((opened.metadata() or {}).get("llava_uhd_projector", "{}"))
    _check_facts(file, facts, config)
    if any("mm_projector." in key for key in tensors):
        return _published_projector(tensors, config)
    return {f"projector.{key}": tensor for key, tensor in tensors.items()}


def _published_projector(tensors: Tensors, config: LlavaUHDConfig) -> Tensors:
    """Published projector weights (``model.mm_projector.*``) under the model's names."""
    state: Tensors = {}
    for key, tensor in tensors.items():
        if "mm_projector." not in key and key.startswith("model."):
            # Rows of tokens around an image (mm_use_im_start_end): no part of the projector.
            logger.warning("a projector file also holds %s, which is not read", key)
            continue
        ours = our_projector_key(key.rpartition("mm_projector.")[2], config.projector)
        if ours is not None:
            state[f"projector.{ours}"] = tensor
    return state


def _check_facts(file: Path, facts: dict[str, Any], config: LlavaUHDConfig) -> None:
    expected = projector_facts(config)
    wrong = [
        f"{key} {value} (the model has {expected[key]})"
        for key, value in facts.items()
        if key in expected and expected[key] != value
    ]
    if wrong:
        raise UserError(
            f"projector {file} was trained for {', '.join(wrong)}: set the model to the same, or "
            "name another projector"
        )
