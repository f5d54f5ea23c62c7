"""A whole model folder out of a LoRA folder and its base."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_uhd.checkpoint.load import build_model, open_checkpoint, set_generation
from llava_uhd.checkpoint.lora import is_lora, merged, open_lora
from llava_uhd.checkpoint.lora_base import Wanted
from llava_uhd.checkpoint.manifest import read_manifest, write_manifest
from llava_uhd.errors import UserError, make_folder


def merge_folder(
    folder: Path,
    out: Path,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the model that a LoRA folder means as a folder of ours that needs no base.

    Args:
        folder: see `llava_uhd.checkpoint.lora.is_lora`.
        out: new or empty.
        base: see `llava_uhd.checkpoint.load.load_pretrained`.
        vision_tower: see there.
        dtype: of the written weights; None takes that of the base's adapted layers.

    Raises:
        UserError: no adapter, a missing base, or ``out`` holds something.
    """
    if not is_lora(folder):
        raise UserError(
            f"{folder} holds no adapter to merge: name the output folder of a LoRA training"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: choose another folder")
    opened, adapter = open_lora(folder, Wanted(base, vision_tower, open_checkpoint))
    layer = next(iter(adapter.layers))
    wanted = dtype or opened[1][f"{layer}.weight"].dtype
    config, state, processor = merged(opened, adapter, wanted)
    model = build_model(config, state, what=f"LoRA folder {folder}", dtype=wanted)
    set_generation(model, processor.tokenizer, folder / "generation_config.json")
    make_folder(out, "output folder")
    model.save_pretrained(out)
    processor.save_pretrained(out)
    facts = read_manifest(folder)
    known = ("stage", "recipe", "language_model", "vision_tower", "checkpoint", "steps", "data")
    write_manifest(
        out,
        kind="model",
        finished=True,
        template=config.template,
        source=str(folder),
        **{key: facts[key] for key in known if key in facts},
    )
