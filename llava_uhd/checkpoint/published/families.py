"""Which original system a model of ours belongs to."""

from __future__ import annotations

from llava_uhd.checkpoint.published.layout import Layout
from llava_uhd.checkpoint.published.llava import LLAVA_1_5, LLAVA_NEXT, LLAVA_ONEVISION
from llava_uhd.checkpoint.published.uhd_v1 import NUM_QUERIES, UHD_V1
from llava_uhd.checkpoint.published.uhd_v2 import UHD_V2, UHD_V2_OLD
from llava_uhd.config.model import LlavaUHDConfig


def own_layout(config: LlavaUHDConfig) -> Layout:
    """The layout of the system whose parts a model has.

    Whether the layout really holds it is found out when it is written.
    """
    kind, language = config.projector.type, config.text_config.model_type
    if config.image.layout == "rows":
        return UHD_V2_OLD
    if kind == "hiwin":
        return UHD_V2
    if kind == "spatial_resampler":
        first = language == "llama" and config.projector.num_queries == NUM_QUERIES
        return UHD_V1 if first else UHD_V2
    if language == "qwen2":
        return LLAVA_ONEVISION
    return LLAVA_NEXT if config.image.strategy == "anyres" else LLAVA_1_5
