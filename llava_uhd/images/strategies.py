"""Registered image strategies: image size in, plan of views out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from llava_uhd.config.model import ImageConfig, VideoConfig
from llava_uhd.images.anyres import expand_pinpoints, plan_anyres
from llava_uhd.images.geometry import Canvas, SlicePlan, fit_long_side, plan_slices
from llava_uhd.registry import Registry

Strategy = Callable[[ImageConfig, int, int, bool], SlicePlan]

IMAGE_STRATEGIES: Registry[Strategy] = Registry("image strategy")


@IMAGE_STRATEGIES.register("slices")
def slices(config: ImageConfig, width: int, height: int, overview_only: bool) -> SlicePlan:
    """LLaVA-UHD: the best grid of slices, then the overview."""
    plan = plan_slices(
        width,
        height,
        config.max_slices,
        config.scale_resolution,
        config.patch_size,
        bounded=config.bounded,
    )
    if overview_only and plan.num_slices:
        # As published: the overview of a large image is that of its sliced plan.
        return SlicePlan(plan.image_size, plan.overview_size, patch_size=plan.patch_size)
    return plan


@IMAGE_STRATEGIES.register("squeeze")
def squeeze(config: ImageConfig, width: int, height: int, overview_only: bool) -> SlicePlan:
    """One square view of the scale resolution, whatever the shape: what SigLIP was trained with."""
    side = config.scale_resolution
    return SlicePlan((width, height), (side, side), patch_size=config.patch_size)


@IMAGE_STRATEGIES.register("square")
def square(config: ImageConfig, width: int, height: int, overview_only: bool) -> SlicePlan:
    """The short side fills the square view, the middle of the long one is cut out.

    What CLIP's preprocessing does; LLaVA-1.5 pretrains so.
    """
    side = config.scale_resolution
    long_side = int(side * max(width, height) / min(width, height))
    scaled = (side, long_side) if width <= height else (long_side, side)
    offset = (-((scaled[0] - side) // 2), -((scaled[1] - side) // 2))
    canvas = Canvas(scaled, offset, (side, side))
    return dataclasses.replace(squeeze(config, width, height, overview_only), overview_on=canvas)


@IMAGE_STRATEGIES.register("pad")
def pad(config: ImageConfig, width: int, height: int, overview_only: bool) -> SlicePlan:
    """The whole image in one square view, padded with the mean colour (LLaVA-1.5)."""
    side = max(width, height)
    offset = ((side - width) // 2, (side - height) // 2)
    canvas = Canvas((width, height), offset, (side, side), fill="mean")
    return dataclasses.replace(squeeze(config, width, height, overview_only), overview_on=canvas)


@IMAGE_STRATEGIES.register("anyres")
def anyres(config: ImageConfig, width: int, height: int, overview_only: bool) -> SlicePlan:
    """LLaVA-NeXT and OneVision: a square overview, then the tiles of the best padded canvas."""
    if overview_only:
        return squeeze(config, width, height, overview_only)
    tile = config.scale_resolution
    sizes = expand_pinpoints(config.pinpoints, tile)
    return plan_anyres(width, height, sizes, tile, config.patch_size)


def prepared_size(config: ImageConfig, width: int, height: int) -> tuple[int, int]:
    """Size of the image after the configured pre-resize, (width, height)."""
    if config.long_side is None:
        return width, height
    return fit_long_side(width, height, config.long_side)


def plan_image(
    config: ImageConfig,
    width: int,
    height: int,
    overview_only: bool = False,
    several: bool = False,
) -> SlicePlan:
    """Plans the views of an image of ``width`` x ``height`` pixels.

    Args:
        config: the model's image configuration; its pre-resize is applied first.
        width: of the image file.
        height: of the image file.
        overview_only: drop the slices (first training stage).
        several: the sample has other images beside it, see ``ImageConfig.several``.
    """
    width, height = prepared_size(config, width, height)
    name = "pad" if several and config.several == "pad" else config.strategy
    return IMAGE_STRATEGIES.get(name)(config, width, height, overview_only)


def plan_frame(config: ImageConfig, video: VideoConfig, width: int, height: int) -> SlicePlan:
    """Plans the one view of a frame of a video.

    Args:
        config: of the model's images.
        video: ``strategy`` names another way than the default: the overview alone of a model that
            cuts slices or tiles, else as a single image.
        width: of the frame.
        height: of the frame.
    """
    name = video.strategy or config.strategy
    return IMAGE_STRATEGIES.get(name)(config, width, height, True)
