"""Registered image strategies: image size in, plan of views out."""

from __future__ import annotations

from collections.abc import Callable

from llava_uhd.config.model import ImageConfig
from llava_uhd.images.geometry import SlicePlan, fit_long_side, plan_slices
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
    """One square view of the scale resolution, whatever the shape: the low-resolution baseline."""
    side = config.scale_resolution // config.patch_size * config.patch_size
    return SlicePlan((width, height), (side, side), patch_size=config.patch_size)


def prepared_size(config: ImageConfig, width: int, height: int) -> tuple[int, int]:
    """Size of the image after the configured pre-resize, (width, height)."""
    if config.long_side is None:
        return width, height
    return fit_long_side(width, height, config.long_side)


def plan_image(
    config: ImageConfig, width: int, height: int, overview_only: bool = False
) -> SlicePlan:
    """Plans the views of an image of ``width`` x ``height`` pixels.

    Args:
        config: the model's image configuration; its pre-resize is applied first.
        width: of the image file.
        height: of the image file.
        overview_only: drop the slices (first training stage).
    """
    width, height = prepared_size(config, width, height)
    return IMAGE_STRATEGIES.get(config.strategy)(config, width, height, overview_only)
