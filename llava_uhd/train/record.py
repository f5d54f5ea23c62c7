"""``run.json``: from what a run was made, each start of it, and how far that came.

Nothing of the environment is written but the variables of `LAUNCHER_VARIABLES`; what follows an
option that sounds like a secret is left out of command lines.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import socket
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_uhd.checkpoint.manifest import code_version, library_versions, write_whole
from llava_uhd.checkpoint.weights import read_json
from llava_uhd.config.training import Recipe
from llava_uhd.train.drawn import DATA_FILE
from llava_uhd.train.flops import CONVENTION
from llava_uhd.train.meter import Meter

logger = logging.getLogger(__name__)

RECORD_FILE = "run.json"

# What launchers tell processes; no other variable is recorded.
LAUNCHER_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK"),
    *("NPROC", "NNODES", "MASTER_ADDR", "MASTER_PORT", "LLAVA_UHD_LAUNCHER"),
    *("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RUN_ID"),
    *("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_JOB_NODELIST"),
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF"),
    *("NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "ACCELERATE_USE_FSDP"),
)
SECRET = re.compile(r"token|password|passwd|secret|api_?key|credential", re.IGNORECASE)
HIDDEN = "(left out)"


def now() -> str:
    """The moment in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def without_secrets(words: Sequence[str]) -> list[str]:
    """A command line without the values of options that sound like secrets.

    Example: ``["--hub_token", "abc", "--x=1"]`` becomes ``["--hub_token", "(left out)", "--x=1"]``.
    """
    found: list[str] = []
    hide = False
    for word in words:
        option, is_set, _ = word.partition("=")
        secret = option.startswith("-") and SECRET.search(option) is not None
        hidden = hide and not word.startswith("--")
        found.append(HIDDEN if hidden else f"{option}={HIDDEN}" if secret and is_set else word)
        hide = secret and not is_set
    return found


def this_rank(device: torch.device) -> dict[str, Any]:
    """The process, its machine and its device."""
    affinity = getattr(os, "sched_getaffinity", None)
    facts: dict[str, Any] = {
        "rank": int(os.environ.get("RANK", "0")),
        "host": socket.gethostname(),
        "device": str(device),
        "name": processor_name(),
        "processors": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts |= {"name": found.name, "memory_gib": round(found.total_memory / 2**30, 1)}
    return facts


def processor_name() -> str:
    """What the machine calls its processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named.group(1).strip() if named else platform.processor() or platform.machine()


def all_ranks(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Facts of every process; all of them call it together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [facts]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, facts)
    return found


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a run, empty if there is none."""
    path = folder / RECORD_FILE
    return read_json(path) if path.is_file() else {}


class RunRecord(TrainerCallback):
    """Writes `RECORD_FILE`; each start of a run is appended to the earlier ones.

    Args:
        folder: output folder, with the resolved recipe and the manifest of the data.
        recipe: of the run.
        meter: of its trainer, which knows the peak of the device.
    """

    def __init__(self, folder: Path, recipe: Recipe, meter: Meter) -> None:
        self.folder = folder
        self.recipe = recipe
        self.meter = meter
        self._values: dict[str, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Appends this start."""
        ranks = all_ranks(this_rank(args.device))
        if not state.is_world_process_zero:
            return
        before = read_record(self.folder) if state.global_step else {}
        self._values = {
            "format": 1,
            **self._described(),
            "starts": [*before.get("starts", []), self._start(args, state, ranks)],
        }
        self._write()

    def _described(self) -> dict[str, Any]:
        """What is the same in every start."""
        data = self.folder / DATA_FILE
        return {
            "recipe": self.recipe.name,
            "stage": self.recipe.stage.name,
            "data_sha256": read_json(data).get("sha256") if data.is_file() else None,
            "flop_convention": CONVENTION,
        }

    def _start(
        self, args: TrainingArguments, state: TrainerState, ranks: list[dict[str, Any]]
    ) -> dict[str, Any]:
        deepspeed = getattr(args, "deepspeed", None)
        peak = self.meter.peak
        return {
            "started": now(),
            "from_step": state.global_step,
            "reached_step": state.global_step,
            "max_steps": state.max_steps,
            "ended": None,
            "how": None,
            "command": without_secrets(sys.orig_argv),
            "seed": args.seed,
            "data_seed": args.data_seed,
            "code": code_version(),
            "python": platform.python_version(),
            "system": platform.platform(),
            "versions": library_versions(),
            "cuda": torch.version.cuda,
            "launcher": {
                name: os.environ[name] for name in LAUNCHER_VARIABLES if name in os.environ
            },
            "devices": len(ranks),
            "per_device_batch": args.per_device_train_batch_size,
            "accumulated": args.gradient_accumulation_steps,
            "deepspeed": Path(deepspeed).stem if isinstance(deepspeed, str) else None,
            "fsdp": getattr(self.recipe, "fsdp", None) if args.fsdp else None,
            "peak": {"flops_per_device": peak.flops, "source": peak.source},
            "ranks": ranks,
        }

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes how far the start came, in case that nothing else is heard of it."""
        self._note(state, reached_step=state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the end."""
        how = "finished" if state.global_step >= state.max_steps else "stopped"
        self._note(state, reached_step=state.global_step, ended=now(), how=how)

    def _note(self, state: TrainerState, **facts: Any) -> None:
        if state.is_world_process_zero and self._values:
            self._values["starts"][-1].update(facts)
            self._write()

    def _write(self) -> None:
        text = json.dumps(self._values, indent=2, ensure_ascii=False, default=str) + "\n"
        try:
            write_whole(self.folder / RECORD_FILE, text)
        except OSError as error:
            # A full disk is told by what cannot do without it.
            logger.warning("%s was not written: %s", self.folder / RECORD_FILE, error)
