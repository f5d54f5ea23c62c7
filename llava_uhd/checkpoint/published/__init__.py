"""Published checkpoint layouts and how they read as ours.

One `Layout` per published system, each in a file of its own. A layout is recognised by the
configuration's keys and the names of the weights, never by a folder name. Its key map sends every
weight that reaches the forward pass to exactly one of ours; every other key must match a pattern of
``unused``. Adding a layout: one file, and its entry in `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from llava_uhd.checkpoint.published.layout import (
    PROJECTOR_PREFIX,
    VISION_PREFIX,
    Layout,
    key_map,
    our_key,
    published_key,
)
from llava_uhd.checkpoint.published.library import LIBRARY
from llava_uhd.checkpoint.published.llava import LLAVA_1_5, LLAVA_NEXT, LLAVA_ONEVISION
from llava_uhd.checkpoint.published.towers import (
    CLIP_L_336,
    KNOWN_TOWERS,
    find_tower,
    tower_config_by_name,
    tower_depth,
)
from llava_uhd.checkpoint.published.uhd_v1 import UHD_V1
from llava_uhd.checkpoint.published.uhd_v2 import UHD_V2, UHD_V2_OLD

LAYOUTS = (UHD_V1, UHD_V2, UHD_V2_OLD, LLAVA_1_5, LLAVA_NEXT, LLAVA_ONEVISION, LIBRARY)


def find_layout(config: dict[str, Any], names: Collection[str] = ()) -> Layout | None:
    """The layout of a published checkpoint, or None if it is not a known one.

    Args:
        config: values of its ``config.json``.
        names: of its weights, where they are at hand.
    """
    return next((layout for layout in LAYOUTS if layout.matches(config, names)), None)


__all__ = [
    "CLIP_L_336",
    "KNOWN_TOWERS",
    "LAYOUTS",
    "LIBRARY",
    "LLAVA_1_5",
    "LLAVA_NEXT",
    "LLAVA_ONEVISION",
    "PROJECTOR_PREFIX",
    "UHD_V1",
    "UHD_V2",
    "UHD_V2_OLD",
    "VISION_PREFIX",
    "Layout",
    "find_layout",
    "find_tower",
    "key_map",
    "our_key",
    "published_key",
    "tower_config_by_name",
    "tower_depth",
]
