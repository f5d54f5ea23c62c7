"""From a recipe to the module that learns and the transform of its pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from llava_uhd.checkpoint.parts import open_tower
from llava_uhd.checkpoint.vdim import read_vdim
from llava_uhd.checkpoint.weights import check_state, read_tensors
from llava_uhd.config.model import ImageConfig, make_config
from llava_uhd.config.vdim import IMAGENET, VdimRecipe
from llava_uhd.errors import UserError
from llava_uhd.train.vdim.data import Transform
from llava_uhd.train.vdim.module import TowerFeatures, VdimModule
from llava_uhd.vision.towers import VisionTower

HEADS_FILE = "heads.safetensors"


def tower_name(recipe: VdimRecipe) -> str:
    """Folder or hub id of the tower; its kind where it starts from nothing."""
    path = recipe.tower.path
    return path if isinstance(path, str) else f"new {dict(path or {}).get('model_type')}"


def build_tower(recipe: VdimRecipe) -> VisionTower:
    """The frozen tower of a recipe, with its weights.

    Raises:
        UserError: missing folder, or weights that do not fit.
    """
    path, layer = recipe.tower.path, recipe.tower.select_layer
    if not isinstance(path, str):
        config = make_config(dict(path or {}), "tower.path")
        tower = VisionTower(config, layer)
        for module in tower.modules():
            reset = getattr(module, "reset_weights", None)
            if callable(reset):
                reset()
        return tower
    return open_tower(path, layer)


def build_module(recipe: VdimRecipe) -> VdimModule:
    """Tower, upsampler and heads; the learning parts have initial values, which follow from the
    recipe's seed.

    Raises:
        UserError: a picture side that does not fit the tower, or a broken tower.
    """
    seed = recipe.trainer.arguments.get("seed", TrainingArguments.seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        features = TowerFeatures(build_tower(recipe))
        check_size(recipe.data.res, features.patch)
        module = VdimModule(features, recipe.vdim)
        # Again: with or without the control, the rest starts alike.
        torch.manual_seed(seed)
        module.reset_weights()
    return module


def check_size(res: int, patch: int) -> None:
    """Raises UserError if pictures of a side have no whole patches, or too few."""
    if res % patch:
        raise UserError(
            f"data.res {res} is no multiple of the tower's patch of {patch} pixels: use "
            f"{max(res // patch, 1) * patch}"
        )
    if res // patch < 3:  # the measurement leaves out the border
        raise UserError(f"data.res {res} has too few patches of {patch} pixels: use {4 * patch}")


def build_transform(recipe: VdimRecipe, module: VdimModule) -> Transform:
    """Squares of the recipe's size and normalisation."""
    if recipe.data.normalisation == "imagenet":
        mean, std = IMAGENET
    else:
        mean, std = ImageConfig().filled(module.features.tower.config).normalisation
    return Transform(recipe.data, tuple(mean), tuple(std))


def published_heads(module: VdimModule) -> dict[str, torch.Tensor]:
    """Downsamplers and uncertainty nets under their published names, on the CPU.

    The largest scale has none in its name (``downsampler.w``), others do (``downsampler_2x.w``).
    """
    return {
        _published_name(name, module): tensor.detach().cpu().contiguous()
        for name, tensor in module.heads.state_dict().items()
    }


def _published_name(name: str, module: VdimModule) -> str:
    """Example: ``2x.scale_net.net.bias`` is ``scale_net_2x.net.bias``."""
    scale, kind, rest = name.split(".", 2)
    suffix = "" if scale == module.head_name(module.config.scale) else f"_{scale}"
    return f"{kind}{suffix}.{rest}"


def load_result(module: VdimModule, folder: Path) -> None:
    """Fills the upsampler and the heads from the folder of a finished run.

    Raises:
        UserError: there is no such result, or it is of another tower or recipe.
    """
    stack = read_vdim(folder, module.features.width, module.config.scale)
    module.upsampler.load_state_dict(stack)
    path = folder / HEADS_FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist: name the output folder of a finished run")
    found = dict(read_tensors(path))
    state = {name: found.get(_published_name(name, module)) for name in module.heads.state_dict()}
    own = {name: tensor for name, tensor in state.items() if tensor is not None}
    check_state(module.heads, own, str(path))
    module.heads.load_state_dict(own)
