"""Files of single parts that a recipe names."""

from __future__ import annotations

from pathlib import Path

from llava_uhd.checkpoint.vdim import UPSAMPLER_PREFIX, read_vdim
from llava_uhd.checkpoint.weights import Tensors
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError


def resolve_projector(path: str) -> Path:
    """Existing projector file or folder.

    Raises:
        UserError: missing; the message names the command that makes one.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(
            f"model.projector_file {path} does not exist: run the first stage before "
            "(bash pretrain.sh), or point it at a projector"
        )
    return found


def resolve_upsampler(path: str) -> Path:
    """Existing file or folder of a pre-trained upsampler.

    Raises:
        UserError: missing; the message names the command that makes one.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(
            f"model.upsampler_file {path} does not exist: train one before "
            "(bash scripts/vdim_pretrain.sh), point it at one, or leave it out "
            "(--model.upsampler_file null)"
        )
    return found


def read_upsampler(path: str, config: LlavaUHDConfig) -> Tensors:
    """Weights of a pre-trained upsampler under the model's names (``projector.upsampler.*``).

    Raises:
        UserError: the model has no upsampler, or the file holds another one.
    """
    scale = max(config.projector.scales)
    if scale == 1:
        raise UserError(
            f"model.upsampler_file {path}: the projector {config.projector.type} reads scale 1 "
            "alone and has no upsampler: leave it out (--model.upsampler_file null)"
        )
    stack = read_vdim(resolve_upsampler(path), config.vision_config.hidden_size, scale)
    return {f"{UPSAMPLER_PREFIX}{key}": tensor for key, tensor in stack.items()}
