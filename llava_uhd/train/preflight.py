"""What a run will need and take, told and checked before it starts."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import TrainingArguments

from llava_uhd.config.training import Recipe
from llava_uhd.data.dataset import ConversationDataset
from llava_uhd.errors import UserError
from llava_uhd.images.geometry import Size
from llava_uhd.images.strategies import plan_frame
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.encoding import IGNORE_INDEX
from llava_uhd.train.compression import RunLength
from llava_uhd.train.counting import Facts
from llava_uhd.train.flops import TrainingFlops, device_peak
from llava_uhd.train.fsdp import fsdp_plan
from llava_uhd.train.kept import projector_bytes
from llava_uhd.train.memory import (
    Batch,
    Memory,
    SharingPlan,
    batch_memory,
    checkpoint_bytes,
    model_bytes,
    state_memory,
)
from llava_uhd.train.setup import world_size
from llava_uhd.train.start import console, is_first_rank, say

logger = logging.getLogger(__name__)

# Part of the peak that estimates of time assume. Published LLaVA-1.5 runs reach 0.20 to 0.37.
ASSUMED_MFU = 0.3
# Estimates above this part of what is there are refused: kernels and buffers need the rest.
USABLE = 0.97
SAMPLED = 16
GIB = 2**30


@dataclass(frozen=True)
class Room:
    """What is there.

    Attributes:
        memory: bytes of a device, or of the host for a CPU.
        where: what has them.
        disk: free bytes where the output goes.
    """

    memory: float
    where: str
    disk: float


@dataclass(frozen=True)
class Outlook:
    """What is known of a run before its first step.

    Attributes:
        memory: on one device.
        length: how many steps.
        tokens: mean tokens of a sample.
        visual: mean visual tokens of a sample.
        longest: most tokens of a looked-at sample.
        flops: mean operations of a sample, or None where no formula is known.
        checkpoint: bytes of a checkpoint in the middle of the run.
        checkpoints: how many of them lie there at the same time, while one is written.
        result: bytes of what the run leaves.
    """

    memory: Memory
    length: RunLength
    tokens: float
    visual: float
    longest: int
    flops: float | None
    checkpoint: float
    checkpoints: int
    result: float

    @property
    def disk(self) -> float:
        """Bytes that the output needs at most."""
        return self.checkpoint * self.checkpoints + self.result


def sharing_plan(arguments: TrainingArguments) -> SharingPlan:
    """How the library shares the state of training out."""
    settings: dict[str, Any] = {}
    found = getattr(arguments, "hf_deepspeed_config", None)
    if found is not None:
        settings = found.config.get("zero_optimization", {})
    stage = int(settings.get("stage", 0))
    if arguments.fsdp:
        return fsdp_plan(arguments, world_size())
    return SharingPlan(world_size(), stage, "offload_optimizer" in settings)


def sampled_facts(dataset: ConversationDataset) -> list[Facts]:
    """Samples spread over the data, counted by their headers and texts; no pixel is decoded."""
    count = min(SAMPLED, len(dataset))
    found = []
    for place in range(count):
        try:
            found.append(_facts(dataset, place * len(dataset) // count))
        except UserError:
            continue  # training meets it as configured
    return found


def _facts(dataset: ConversationDataset, index: int) -> Facts:
    headers, processor = dataset.headers(index), dataset.processor
    encoding = dataset.encode_headers(index, headers)
    length = len(encoding.input_ids)
    if dataset.config.max_length is not None:
        length = min(length, dataset.config.max_length)
    grids: list[Size] = []
    pairs = zip(dataset.records[index].images, headers.images, strict=True)
    sizes = [dataset.fixed_size(path, size, index) for path, size in pairs]
    for size in sizes:
        plan = processor.plan(*size, dataset.config.overview_only, len(sizes) > 1)
        grids += plan.view_grids
    for frames, size in headers.videos:
        frame = plan_frame(processor.image_config, processor.video_config, *size)
        grids += list(frame.view_grids) * frames
    learned = sum(label != IGNORE_INDEX for label in encoding.labels[1:length])
    visual = sum(stop - start for start, stop in encoding.runs)
    return Facts((length,), length, min(visual, length), learned, tuple(grids))


def largest_batch(samples: Sequence[Facts], rows: int, slots: int | None) -> Batch:
    """The worst micro-batch to expect: rows like the longest sample, or one full packed row.

    Args:
        samples: some.
        rows: samples of a micro-batch.
        slots: tokens of a packed row; None: rows are padded.
    """
    longest = max(samples, key=lambda facts: facts.slots)
    count = float(rows) if slots is None else slots / longest.slots
    repeats = max(round(count), 1)
    return Batch(
        round(count * longest.slots), round(count * longest.learned), longest.grids * repeats
    )


def look_ahead(
    recipe: Recipe,
    arguments: TrainingArguments,
    model: LlavaUHDForConditionalGeneration,
    samples: Sequence[Facts],
    length: RunLength,
    whole: bool = True,
    slots: int | None = None,
) -> Outlook:
    """Estimates of a run.

    Args:
        recipe: of the run.
        arguments: for the library.
        model: with its learning parts chosen.
        samples: some of its data.
        length: of the run.
        whole: the result is a whole model, not only what learned.
        slots: tokens of a packed row; None: rows are padded.
    """
    learning = {
        part: any(p.requires_grad for p in module.parameters())
        for part, module in model.named_children()
    }
    plan, optimizer = sharing_plan(arguments), str(getattr(arguments.optim, "value", "adamw_torch"))
    half = bool(arguments.bf16 or arguments.fp16)
    masters = half and bool(arguments.deepspeed)
    state = state_memory(model, plan, optimizer, masters)
    batch = largest_batch(samples, arguments.per_device_train_batch_size, slots)
    dtype = torch.bfloat16 if half else torch.float32
    checkpointing, form = bool(arguments.gradient_checkpointing), recipe.trainer.loss
    active = batch_memory(model.config, batch, learning, dtype, checkpointing, form)
    projector = _projector_bytes(model, batch, dtype) if learning.get("projector") else 0.0
    kept = arguments.save_total_limit or max(length.steps // max(int(arguments.save_steps), 1), 1)
    saves = 0 if str(getattr(arguments.save_strategy, "value", "steps")) == "no" else kept + 1
    return Outlook(
        memory=Memory(
            state.weights,
            state.gradients,
            state.optimizer,
            active.activations + projector,
            active.logits,
        ),
        length=length,
        tokens=sum(facts.tokens for facts in samples) / len(samples),
        visual=sum(facts.visual for facts in samples) / len(samples),
        longest=max(facts.tokens for facts in samples),
        flops=_flops(recipe, model, samples),
        checkpoint=checkpoint_bytes(model, optimizer, masters),
        checkpoints=saves,
        result=model_bytes(model, whole),
    )


def _projector_bytes(
    model: LlavaUHDForConditionalGeneration, batch: Batch, dtype: torch.dtype
) -> float:
    width, patch = model.config.vision_config.hidden_size, model.config.image.patch_size
    try:
        return projector_bytes(model.projector, width, patch, batch.grids, dtype.itemsize)
    except (RuntimeError, NotImplementedError) as error:
        # A dtype that the host cannot compute in, say: the run itself may.
        logger.info("what the projector keeps is not in the estimate: %s", error)
        return 0.0


def _flops(
    recipe: Recipe,
    model: LlavaUHDForConditionalGeneration,
    samples: Sequence[Facts],
) -> float | None:
    try:
        count = TrainingFlops(model.config, recipe.stage.learn, recipe.lora.enabled)
        return sum(count(facts).total for facts in samples) / len(samples)
    except UserError:
        return None  # a part without a formula


def room(arguments: TrainingArguments, folder: Path, loaded: float = 0.0) -> Room:
    """What the machine has for a run.

    Args:
        arguments: of it.
        folder: output folder. What an earlier start left there counts as room: it is used again.
        loaded: bytes of the weights, which already lie in the memory of the host.
    """
    left = sum(each.stat().st_size for each in folder.glob("checkpoint-*/**/*") if each.is_file())
    disk = float(shutil.disk_usage(folder).free + left)
    if arguments.device.type == "cuda":
        index = arguments.device.index or 0
        free = float(torch.cuda.mem_get_info(index)[0])
        return Room(free, f"{torch.cuda.get_device_name(index)} (free)", disk)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Room(_host_memory() / here + loaded, "memory of this host", disk)


def _host_memory() -> float:
    """Bytes that the host can still give; infinite where it does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass  # no Linux
    return float("inf")


def table_of(outlook: Outlook, here: Room, global_samples: float) -> Table:
    """The figures, for people."""
    memory, table = outlook.memory, Table(title="Before the first step", title_justify="left")
    table.add_column("what")
    table.add_column("estimate", justify="right")
    table.add_column("of")
    for name in ("weights", "gradients", "optimizer", "activations", "logits"):
        table.add_row(f"memory: {name}", gibibytes(getattr(memory, name)), "")
    table.add_row(
        "memory of a device", gibibytes(memory.total), f"{gibibytes(here.memory)}, {here.where}"
    )
    table.add_row(
        "disk",
        gibibytes(outlook.disk),
        f"{gibibytes(here.disk)} free; {outlook.checkpoints} checkpoints of "
        f"{gibibytes(outlook.checkpoint)} and the result",
    )
    table.add_row(
        "tokens of a sample",
        f"{outlook.tokens:.0f}",
        f"{outlook.visual:.0f} of them visual; the longest looked at has {outlook.longest}",
    )
    steps = outlook.length.steps
    total = steps * global_samples * outlook.tokens
    table.add_row("steps", f"{steps:,}", f"{total:,.0f} tokens in all")
    return table


def gibibytes(size: float) -> str:
    """``"1.50 GiB"``, or ``"12.0 MiB"`` below a hundredth of that."""
    if size == float("inf"):
        return "unknown"
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.1f} MiB"


def expected_hours(
    outlook: Outlook, global_samples: float, devices: int, peak: float
) -> float | None:
    """Hours at `ASSUMED_MFU`; None where operations cannot be counted."""
    if outlook.flops is None:
        return None
    work = outlook.flops * global_samples * outlook.length.steps
    return work / (devices * peak * ASSUMED_MFU) / 3600


def check_room(outlook: Outlook, here: Room) -> None:
    """Refuses what cannot fit.

    Raises:
        UserError: memory or disk is too small; what is needed, what is there and what helps.
    """
    memory = outlook.memory
    if memory.total > USABLE * here.memory:
        largest = max(
            ("weights", "gradients", "optimizer", "activations", "logits"),
            key=lambda name: getattr(memory, name),
        )
        raise UserError(
            f"the run needs about {gibibytes(memory.total)} on a device, {here.where} has "
            f"{gibibytes(here.memory)}; most of it for {largest} "
            f"({gibibytes(getattr(memory, largest))}): {ADVICE[largest]}; or start it all the same "
            "(--trainer.check_room false)"
        )
    if outlook.disk > here.disk:
        raise UserError(
            f"the output needs up to {gibibytes(outlook.disk)} of disk "
            f"({outlook.checkpoints} checkpoints of {gibibytes(outlook.checkpoint)}), "
            f"{gibibytes(here.disk)} are free: set --trainer.save_total_limit 1, or "
            "--trainer.output_dir on another disk; or start it all the same "
            "(--trainer.check_room false)"
        )


ADVICE = {
    "weights": "--deepspeed zero3 or --fsdp full_shard shares them out, 4 bits below adapters "
    "shrink them (QLoRA)",
    "gradients": "--deepspeed zero2 or zero3 shares them out over more devices, LoRA needs few",
    "optimizer": "--deepspeed zero2 or zero3 shares it out, zero3_offload moves it to the host, "
    "--trainer.optim adamw_bnb_8bit shrinks it",
    "activations": "--trainer.gradient_checkpointing true, or a smaller "
    "--trainer.per_device_train_batch_size (the global batch stays)",
    "logits": "--trainer.loss chunked, or a smaller --trainer.per_device_train_batch_size (the "
    "global batch stays)",
}


def preflight(
    recipe: Recipe,
    arguments: TrainingArguments,
    model: LlavaUHDForConditionalGeneration,
    dataset: ConversationDataset,
    length: RunLength,
    whole: bool = True,
    slots: int | None = None,
) -> None:
    """Says what the run will need, and refuses what cannot fit.

    Args:
        recipe: of the run.
        arguments: for the library.
        model: with its learning parts chosen.
        dataset: of the run.
        length: of the run.
        whole: the result is a whole model, not only what learned.
        slots: tokens of a packed row; None: rows are padded.

    Raises:
        UserError: see `check_room`.
    """
    samples = sampled_facts(dataset)
    if not samples:
        return  # the run itself says what is wrong with its data
    outlook = look_ahead(recipe, arguments, model, samples, length, whole, slots)
    here = room(arguments, Path(recipe.output_dir), model_bytes(model))
    devices = world_size()
    rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    in_step = float(rows * devices)
    if slots is not None:
        in_step *= slots / outlook.tokens
    if is_first_rank():
        console.print(table_of(outlook, here, in_step))
    if arguments.device.type == "cuda":
        peak = device_peak(arguments.device)
        hours = peak.flops and expected_hours(outlook, in_step, devices, peak.flops)
        if hours:
            say(f"about {hours:.1f} hours at an assumed MFU of {ASSUMED_MFU:.0%} ({peak.source})")
    if recipe.trainer.check_room:
        check_room(outlook, here)
