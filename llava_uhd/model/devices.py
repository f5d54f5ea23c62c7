"""Where a model runs, and in which precision."""

from __future__ import annotations

import torch

from llava_uhd.errors import UserError


def choose_device(name: str | None = None) -> torch.device:
    """The device of that name, or the best one here: cuda, then mps, then cpu.

    Args:
        name: "cuda", "cuda:1", "mps", "cpu"; None or "auto" chooses.

    Raises:
        UserError: unknown name, or a device that this machine does not have.
    """
    if name in (None, "", "auto"):
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(str(name))
    except RuntimeError:
        raise UserError(f"device '{name}' is not one of cuda, cuda:N, mps, cpu") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"device '{name}' is not here: torch sees {count} GPUs; use cpu")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps' is not here: use cpu")
    elif device.type not in ("cpu", "mps"):
        raise UserError(f"device '{name}' is not one of cuda, cuda:N, mps, cpu")
    return device


def choose_dtype(device: torch.device) -> torch.dtype:
    """Precision for inference on a device.

    bfloat16 on GPUs that have it, float16 on older ones and on mps, float32 on the CPU, where the
    short types are slower.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32
