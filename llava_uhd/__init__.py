"""LLaVA-UHD: native-resolution multimodal language models.

The four names below are what most programs need. They are loaded on first use, so that
``import llava_uhd`` costs nothing and pure parts (`llava_uhd.images.geometry`) stay torch-free.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_uhd.checkpoint.load import load_pretrained
    from llava_uhd.config.model import LlavaUHDConfig
    from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
    from llava_uhd.text.processor import LlavaUHDProcessor

__version__ = "0.1.0"

# On a CPU, bitsandbytes warns at import of a faster kernel that it could not fetch, and the trainer
# of transformers imports it where it is installed: no command is about that.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__all__ = [
    "LlavaUHDConfig",
    "LlavaUHDForConditionalGeneration",
    "LlavaUHDProcessor",
    "__version__",
    "load_pretrained",
]

_HOMES = {
    "LlavaUHDConfig": "llava_uhd.config.model",
    "LlavaUHDForConditionalGeneration": "llava_uhd.model.modeling",
    "LlavaUHDProcessor": "llava_uhd.text.processor",
    "load_pretrained": "llava_uhd.checkpoint.load",
}


def __getattr__(name: str) -> Any:
    """Imports the module of a public name when the name is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'llava_uhd' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
