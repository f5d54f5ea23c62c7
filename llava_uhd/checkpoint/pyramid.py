"""The feature pyramid of a checkpoint, as pictures: what the upsampler adds to the tower's maps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.parts import open_tower
from llava_uhd.checkpoint.vdim import find_vdim, read_vdim, vdim_facts
from llava_uhd.checkpoint.weights import first_line
from llava_uhd.config.model import ImageConfig
from llava_uhd.errors import UserError
from llava_uhd.images.feature_pictures import pyramid_picture, stack_sheets
from llava_uhd.images.geometry import SlicePlan
from llava_uhd.images.pixels import cut_views, pack_views
from llava_uhd.images.strategies import plan_image, prepared_size
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.projectors.hiwin_weights import whole_images
from llava_uhd.vision.towers import VisionTower
from llava_uhd.vision.upsampler import UpsamplerStack

Maps = dict[int | str, torch.Tensor]

# How a pre-training names a tower that it started from nothing.
NEW_TOWER = "new "


@dataclass(frozen=True)
class Pyramid:
    """A tower and the upsampler on top of it.

    Attributes:
        tower: in evaluation mode.
        stack: in evaluation mode.
        image: how pictures become views.
    """

    tower: VisionTower
    stack: UpsamplerStack
    image: ImageConfig

    @classmethod
    def of_model(cls, model: LlavaUHDForConditionalGeneration) -> Pyramid:
        """The pyramid inside a whole model.

        Raises:
            UserError: its projector has no upsampler.
        """
        stack = getattr(model.projector, "upsampler", None)
        if not isinstance(stack, UpsamplerStack):
            raise UserError(
                f"the model's projector '{model.config.projector.type}' with scales "
                f"{list(model.config.projector.scales)} has no upsampler: name a LLaVA-UHD v2 "
                "model, or the folder of an upsampler (VDIM)"
            )
        return cls(model.vision_tower, stack, model.config.image)

    @torch.inference_mode()
    def picture(self, image: Image.Image) -> Image.Image:
        """The overview of an image and its maps; below, its slices joined, and theirs.

        Args:
            image: RGB.
        """
        size = prepared_size(self.image, *image.size)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        plan = plan_image(self.image, *size)
        views = cut_views(image, plan)
        maps = self._view_maps(image, plan)
        sheets = [pyramid_picture(views[-1], maps[-1])]
        if plan.grid is not None and plan.refine_size is not None:
            refined = image.resize(plan.refine_size, Image.Resampling.BICUBIC)
            sheets.append(pyramid_picture(refined, _join(maps[:-1], plan.grid[0])))
        return stack_sheets(sheets)

    def _view_maps(self, image: Image.Image, plan: SlicePlan) -> list[Maps]:
        """The maps of each view: scale -> (C, h, w)."""
        parameter = next(self.stack.parameters())
        pixels, grids = pack_views(image, plan, *self.image.normalisation)
        pixels = pixels.to(parameter.device)
        features = self.tower(pixels, grids).to(parameter.dtype)
        sizes = [rows * columns for rows, columns in plan.view_grids]
        maps: list[Maps] = []
        for grid, view, patches in zip(
            plan.view_grids, features.split(sizes), pixels.split(sizes), strict=True
        ):
            source = view.unflatten(0, grid).permute(2, 0, 1)  # (C, rows, columns)
            guidance = whole_images(patches.unsqueeze(0), grid).to(source.dtype)
            above = self.stack(source.unsqueeze(0), guidance)
            maps.append({1: source, **{scale: above[scale][0] for scale in sorted(above)}})
        return maps


def _join(maps: list[Maps], columns: int) -> Maps:
    """Maps of slices, row by row, to maps of the whole."""
    joined: Maps = {}
    for scale in maps[0]:
        rows = [
            torch.cat([each[scale] for each in maps[start : start + columns]], dim=2)
            for start in range(0, len(maps), columns)
        ]
        joined[scale] = torch.cat(rows, dim=1)
    return joined


def open_pyramid(path: str | Path) -> Pyramid:
    """Tower and upsampler of a LLaVA-UHD v2 model, or of an upsampler's own folder.

    Raises:
        UserError: neither of the two, or a part that cannot be read.
    """
    folder = Path(path)
    if (folder / "config.json").is_file() or not folder.exists():
        return Pyramid.of_model(load_pretrained(path)[0])
    facts = vdim_facts(folder)
    if "tower" not in facts:
        raise UserError(
            f"{find_vdim(folder)} does not say which tower it belongs to: name the model that "
            "uses it, or a folder that scripts/vdim_pretrain.sh wrote"
        )
    if facts["tower"].startswith(NEW_TOWER):
        raise UserError(
            f"{find_vdim(folder)} belongs to a {facts['tower']}, which was made for a test and is "
            "not kept: name an upsampler for a tower with a folder of its own"
        )
    try:
        width, scale = int(facts["width"]), int(facts["scale"])
        layer = int(facts.get("select_layer", "-2"))
        mean, std = (tuple(map(float, json.loads(facts[name]))) for name in ("mean", "std"))
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{find_vdim(folder)}: its metadata (width, scale, mean, std) are incomplete or broken "
            f"({first_line(error)}): write it again with scripts/vdim_pretrain.sh"
        ) from error
    stack_state = read_vdim(folder, width, scale)
    tower = open_tower(_find_tower(facts["tower"]), layer)
    stack = UpsamplerStack(width, scale)
    stack.load_state_dict(stack_state)
    image = ImageConfig(
        scale_resolution=tower.config.image_size,
        patch_size=tower.config.patch_size,
        mean=mean,
        std=std,
    )
    return Pyramid(tower, stack.eval(), image)


def _find_tower(recorded: str) -> str | Path:
    """The recorded folder from here or, as in a training command, from the repository."""
    from_repository = Path(__file__).resolve().parents[2] / recorded
    if not Path(recorded).exists() and (from_repository / "config.json").is_file():
        return from_repository
    return recorded
