"""From a recipe to the module that learns and the transform of its pictures."""

from __future__ import annotations

import torch
from transformers import TrainingArguments

from llava_uhd.checkpoint.parts import open_tower
from llava_uhd.config.model import ImageConfig, make_config
from llava_uhd.config.vdim import IMAGENET, VdimRecipe
from llava_uhd.errors import UserError
from llava_uhd.train.vdim.data import Transform
from llava_uhd.train.vdim.module import TowerFeatures, VdimModule
from llava_uhd.vision.towers import VisionTower


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
    """Tower, upsampler and heads; the learning parts have initial values.

    Raises:
        UserError: a picture side that does not fit the tower, or a broken tower.
    """
    features = TowerFeatures(build_tower(recipe))
    res, patch = recipe.data.res, features.patch
    if res % patch:
        raise UserError(
            f"data.res {res} is no multiple of the tower's patch of {patch} pixels: use "
            f"{max(res // patch, 1) * patch}"
        )
    if res // patch < 2:
        raise UserError(f"data.res {res} has too few patches of {patch} pixels: use {4 * patch}")
    module = VdimModule(features, recipe.vdim)
    # Not the state that building left: with or without the control, the rest starts alike.
    with torch.random.fork_rng([]):
        torch.manual_seed(recipe.trainer.arguments.get("seed", TrainingArguments.seed))
        module.reset_weights()
    return module


def build_transform(recipe: VdimRecipe, module: VdimModule) -> Transform:
    """Squares of the recipe's size and normalisation."""
    if recipe.data.normalisation == "imagenet":
        mean, std = IMAGENET
    else:
        mean, std = ImageConfig().filled(module.features.tower.config).normalisation
    return Transform(recipe.data, tuple(mean), tuple(std))
