"""How the weights of projectors are called in published files, and which of them are dead.

All published systems share these names, so does the projector file of a first stage. The names here
are those behind ``mm_projector.``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from llava_uhd.config.model import ProjectorConfig

# Published weights of the multi-scale projector that never reach an output, each with the reason.
HIWIN_UNUSED = {
    r"query": "left over from the projector of LLaVA-UHD v1",
    r"kv_proj\.weight": "left over from the projector of LLaVA-UHD v1",
    r"upsampler\.model\.0\..*": "a second copy of the vision tower, which never runs",
    r"upsampler\.model\.1\..*": "a norm of the upsampler's pre-training, which never runs here",
    r"upsampler\.upsampler\..*": "an upsampler beside a projector that reads the tower's map only",
    r"features_[1248]x_projector\..*": "of a scale that the model does not read",
    r"feature_[1248]x_embedding": "of a scale that the model does not read",
}

_HIWIN_DEAD = re.compile(r"query|kv_proj\.weight|upsampler\.model\..*")
_SCALE = re.compile(r"features?_(\d)x_(?:projector\.(?:weight|bias)|embedding)")
# The linear layers and activations of an MLP.
_LAYERS = "layers."
# The published stack lies in a wrapper of the same name.
_PUBLISHED_STACK, _STACK = "upsampler.upsampler.", "upsampler."


def is_mlp(options: ProjectorConfig) -> bool:
    """Whether a projector is a stack of linear layers (published: bare, or a list of modules)."""
    return options.type == "linear" or re.fullmatch(r"mlp\d+x_gelu", options.type) is not None


def our_projector_key(name: str, options: ProjectorConfig) -> str | None:
    """Our name of a published projector weight, or None if the model does not use it.

    Args:
        name: behind ``mm_projector.``, for instance ``upsampler.upsampler.up1.range_temp``.
        options: of the projector that is filled.
    """
    if is_mlp(options):
        return f"{_LAYERS}0.{name}" if options.type == "linear" else f"{_LAYERS}{name}"
    if options.type != "hiwin":
        return name
    if _HIWIN_DEAD.fullmatch(name):
        return None
    scaled = _SCALE.fullmatch(name)
    if scaled and int(scaled.group(1)) not in options.scales:
        return None
    if name.startswith(_PUBLISHED_STACK):
        return _STACK + name.removeprefix(_PUBLISHED_STACK) if max(options.scales) > 1 else None
    return name


def published_projector_key(name: str, options: ProjectorConfig) -> str:
    """Inverse of `our_projector_key` on the names that the model uses."""
    if is_mlp(options):
        bare = name.removeprefix(_LAYERS)
        return bare.removeprefix("0.") if options.type == "linear" else bare
    if options.type == "hiwin" and name.startswith(_STACK):
        return _PUBLISHED_STACK + name.removeprefix(_STACK)
    return name


def is_multi_scale(names: Iterable[str]) -> bool | None:
    """Whether published projector weights are those of the multi-scale projector.

    Args:
        names: full or bare published names, of a whole checkpoint or a projector file.

    Returns:
        None if there is no projector among them.
    """
    inside = [name.rpartition("mm_projector.")[2] for name in names if "mm_projector." in name]
    return "query_1" in inside if inside else None
