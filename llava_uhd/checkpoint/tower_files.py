"""The vision tower as the configuration of an original system names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_uhd.checkpoint.differences import HOUSEKEEPING
from llava_uhd.checkpoint.manifest import write_whole
from llava_uhd.checkpoint.published.towers import hub_name, tower_habits
from llava_uhd.config.model import NORMALISATION, LlavaUHDConfig
from llava_uhd.errors import make_folder


def tower_folder(config: LlavaUHDConfig) -> str:
    """Name of the folder that describes a tower; the published code knows the family by it."""
    return f"{tower_habits(config.vision_config).name}-vision-tower"


def known_tower(config: LlavaUHDConfig) -> str | None:
    """Hub id of a well-known tower, if images are prepared as it is used to."""
    vision = config.vision_config
    usual = NORMALISATION.get(vision.model_type)
    return hub_name(vision) if config.image.normalisation == usual else None


def write_tower(folder: Path, config: LlavaUHDConfig) -> None:
    """Shape and normalisation of the tower; its weights are in the checkpoint."""
    make_folder(folder, "output folder")
    vision = config.vision_config
    mean, std = config.image.normalisation
    side = vision.image_size
    values = {key: value for key, value in vision.to_dict().items() if key not in HOUSEKEEPING}
    write_whole(folder / "config.json", _json(values))
    pixels = {
        "image_processor_type": f"{'CLIP' if 'clip' in vision.model_type else 'Siglip'}"
        "ImageProcessor",
        "crop_size": {"height": side, "width": side},
        "size": {"shortest_edge": side},
        "do_resize": True,
        "do_center_crop": True,
        "do_normalize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    write_whole(folder / "preprocessor_config.json", _json(pixels))


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
