"""Going on with another number of processes than a checkpoint was written by."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from llava_uhd.checkpoint.weights import read_json
from llava_uhd.errors import UserError
from llava_uhd.train.optimizers import rounds_state
from llava_uhd.train.saving import SEAL_FILE, UNFINISHED
from llava_uhd.train.start import say

ENGINES = {
    "plain": "without DeepSpeed and FSDP",
    "deepspeed": "with DeepSpeed",
    "fsdp": "with FSDP",
}


def seal_facts(trainer: Trainer) -> dict[str, Any]:
    """What decides whether a checkpoint can be gone on from; it stands in the seal."""
    args = trainer.args
    engine = "deepspeed" if trainer.is_deepspeed_enabled else "plain"
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "engine": "fsdp" if trainer.is_fsdp_enabled else engine,
        "ranks": args.world_size,
        "global_batch": batch,
    }


def fitting(trainer: Trainer, checkpoint: Path) -> Path:
    """A folder with a checkpoint's state that the processes of this run can read.

    What DeepSpeed has shared out over other numbers of processes is converted, into a copy (without
    taking more room for the files that stay the same); all else is read as it is, shares of FSDP
    (`llava_uhd.train.shares`) also without FSDP, and the other way round.

    Args:
        trainer: before it trains.
        checkpoint: whole.

    Raises:
        UserError: it was written by another engine, or with another global batch.
    """
    then, now = read_json(checkpoint / SEAL_FILE), seal_facts(trainer)
    processes = f"{then['ranks']} process{'es' if then['ranks'] > 1 else ''}"
    if then["engine"] != now["engine"] and "deepspeed" in (then["engine"], now["engine"]):
        raise UserError(
            f"{checkpoint} was written {ENGINES[then['engine']]} on {processes}, this run is "
            f"{ENGINES[now['engine']]}: start it as before (NPROC={then['ranks']}), because the "
            "optimizer's state cannot be carried over"
        )
    if then["global_batch"] != now["global_batch"]:
        raise UserError(
            f"{checkpoint} was written with a global batch of {then['global_batch']}, this run has "
            f"{now['global_batch']}: start it on {processes}, or set trainer.global_batch_size in "
            "runs that are to change their number of processes"
        )
    if then["ranks"] == now["ranks"]:
        return checkpoint
    if now["engine"] == "deepspeed" and rounds_state(trainer.args):
        raise UserError(
            f"{checkpoint} was written by {processes}, this run has {now['ranks']}: 8-bit state "
            f"that DeepSpeed has shared out cannot be shared anew. Use NPROC={then['ranks']}"
        )
    say(
        f"{checkpoint.name} was written by {processes}, now there are {now['ranks']}: global batch "
        "and order of the data stay"
    )
    return _universal(trainer, checkpoint) if now["engine"] == "deepspeed" else checkpoint


def _universal(trainer: Trainer, checkpoint: Path) -> Path:
    target = checkpoint.parent / UNFINISHED / "universal" / checkpoint.name
    if trainer.args.process_index == 0:
        say("converting what DeepSpeed has shared out ...")
        link_files(checkpoint, target)
        convert(checkpoint, target)
    torch.distributed.barrier()
    plugin = trainer.accelerator.state.deepspeed_plugin
    for holder in (plugin.hf_ds_config, trainer.args.hf_deepspeed_config):
        holder.config["checkpoint"] = {"load_universal": True}
    return target


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the groups of an optimizer are set to, without their parameters."""
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def mend(optimizer: Any, settings: list[dict[str, Any]], rates: list[float]) -> None:
    """Repairs what DeepSpeed's ZeRO-3 reads from its universal form (0.19).

    It sets all groups of parameters to what the first one was set to, and lets all parameters share
    one counter of steps, which each of them then raises.

    Args:
        optimizer: the one that takes the steps, after loading.
        settings: of its groups, as the recipe has them.
        rates: of its groups, for the next step.
    """
    groups = zip(optimizer.param_groups, settings, rates, strict=True)
    for group, own, rate in groups:
        group.update(own)
        group["lr"] = rate
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def link_files(source: Path, target: Path) -> None:
    """Gives the files of a folder second names in another one."""
    for path in source.rglob("*"):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, place)
        except OSError:  # file systems without such names
            place.symlink_to(path.resolve())


def convert(checkpoint: Path, target: Path) -> None:
    """Writes DeepSpeed's universal form of a checkpoint into its linked copy.

    Args:
        checkpoint: as DeepSpeed wrote it.
        target: from `link_files`.
    """
    from deepspeed.checkpoint import ds_to_universal

    tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    options = argparse.Namespace(
        input_folder=str(target / tag),
        output_folder=str(target / f"{tag}_universal"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)
    for name in ("latest", "latest_universal"):
        (target / name).unlink(missing_ok=True)
        (target / name).write_text(f"{tag}_universal", encoding="utf-8")
