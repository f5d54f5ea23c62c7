"""Training passes of a language model with and without compression, timed in turns."""

from __future__ import annotations

import ctypes
import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llava_uhd.bench.compress_cost import Prompt, decoder_flops
from llava_uhd.config.compression import CompressionConfig, Stage
from llava_uhd.images.cost import language_shape
from llava_uhd.language.compressed import decode_compressed, is_active
from llava_uhd.language.decoder import IGNORE_INDEX, decode
from llava_uhd.language.loss import supervised_loss
from llava_uhd.language.runs import Run, place_runs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEAD_WIDTH = 64
# Of the text: what stands before the picture. All behind it is learned.
TEXT_BEFORE = 1 / 7

FORWARD, WHOLE = "forward", "forward_backward"


@dataclass(frozen=True)
class Task:
    """A language model and a batch.

    Attributes:
        layers: decoder layers.
        hidden: width; heads have 64 channels.
        mlp: width of the MLP.
        vocabulary: entries.
        batch: rows.
        visual: visual tokens in each row, one run.
        text: other tokens in each row.
        padding: text tokens that every second row is shorter.
        dtype: of weights and states.
        device: where.
    """

    layers: int = 12
    hidden: int = 512
    mlp: int = 1376
    vocabulary: int = 4096
    batch: int = 2
    visual: int = 576
    text: int = 250
    padding: int = 0
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def config(self) -> LlamaConfig:
        """Of the language model."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // HEAD_WIDTH,
            num_key_value_heads=self.hidden // HEAD_WIDTH,
            vocab_size=self.vocabulary,
        )

    @property
    def before(self) -> int:
        """Text tokens before the picture, at least one."""
        return max(round(self.text * TEXT_BEFORE), 1)

    @property
    def prompt(self) -> Prompt:
        """A full row."""
        return Prompt(self.visual, self.text, self.text - self.before)

    def flops(self, stage: Stage, attention: float = 1.0) -> float:
        """Operations of a forward pass, padded rows counted as full ones."""
        shape = language_shape(self.config)
        return self.batch * decoder_flops(shape, stage, self.prompt, attention)


@dataclass(frozen=True)
class Batch:
    """Embedded rows: text, a picture, text that is learned, padding.

    Attributes:
        embeds: (B, T, D), with gradient.
        mask: int64 (B, T).
        labels: int64 (B, T).
        visual: bool (B, T), the visual tokens.
        runs: of all rows.
    """

    embeds: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    visual: torch.Tensor
    runs: list[Run]


@dataclass
class Times:
    """Seconds of each turn, by part of the pass.

    Attributes:
        cpu: of the process.
        wall: passed.
    """

    cpu: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: {FORWARD: [], WHOLE: []}
    )
    wall: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: {FORWARD: [], WHOLE: []}
    )


def make_model(task: Task) -> LlamaForCausalLM:
    """A new language model in training mode."""
    torch.manual_seed(0)
    return LlamaForCausalLM(task.config).train().to(task.device, DTYPES[task.dtype])


def make_batch(task: Task) -> Batch:
    """Random rows."""
    generator = torch.Generator().manual_seed(1)
    size = (task.batch, task.visual + task.text)
    columns = torch.arange(size[1]).expand(size)
    visual = (columns >= task.before) & (columns < task.before + task.visual)
    lengths = torch.tensor([size[1] - task.padding * (row % 2) for row in range(task.batch)])
    mask = columns < lengths[:, None]
    labels = torch.randint(task.vocabulary, size, generator=generator)
    labels[~mask | (columns < task.before + task.visual)] = IGNORE_INDEX
    embeds = torch.randn(*size, task.hidden, generator=generator)
    embeds = embeds.to(task.device, DTYPES[task.dtype]).requires_grad_()
    mask_, labels, visual = (each.to(task.device) for each in (mask.long(), labels, visual))
    side = round(task.visual**0.5)
    run = Run(task.visual, side if side * side == task.visual else 0)
    return Batch(embeds, mask_, labels, visual, [run] * task.batch)


def make_pass(model: LlamaForCausalLM, batch: Batch, stage: Stage) -> Callable[[], torch.Tensor]:
    """The pass of a stage, up to the loss: as the whole model makes it in training."""
    options = CompressionConfig("avgpool1d").of_stage(stage)
    inputs: dict[str, Any] = {"attention_mask": batch.mask, "use_cache": False}
    head = model.get_output_embeddings()
    if not is_active(options, model.config.num_hidden_layers):

        def whole() -> torch.Tensor:
            states = decode(model, inputs_embeds=batch.embeds, **inputs).last_hidden_state
            return supervised_loss(head, states, batch.labels)

        return whole

    def shortened() -> torch.Tensor:
        runs = place_runs(batch.visual, batch.runs)
        found = decode_compressed(model.get_decoder(), options, runs, batch.embeds, **inputs)
        assert found.index_map is not None
        return supervised_loss(head, found.hidden, found.index_map.labels(batch.labels))

    return shortened


def in_process(
    task: Task, stages: Sequence[Stage], repeats: int, threads: int
) -> dict[Stage, Times]:
    """`measure` in a new process that keeps the memory which it frees.

    Else the longest sequence alone would pay the system for its memory again in every pass.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure_alone, task, stages, repeats, threads).result()


def _measure_alone(
    task: Task, stages: Sequence[Stage], repeats: int, threads: int
) -> dict[Stage, Times]:
    torch.set_num_threads(threads)
    keep_memory()
    return measure(task, stages, repeats)


def keep_memory() -> None:
    """Freed memory stays with this process, where the C library knows how."""
    trim_threshold, largest, mmap_max, none = -1, 2**31 - 1, -4, 0
    try:
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, largest)
        library.mallopt(mmap_max, none)
    except (AttributeError, OSError, TypeError):
        return


def measure(task: Task, stages: Sequence[Stage], repeats: int) -> dict[Stage, Times]:
    """Times of the passes of all stages, in turns.

    Args:
        task: model and batch.
        stages: each once.
        repeats: timed turns; one more warms up.
    """
    model, batch = make_model(task), make_batch(task)
    passes = {stage: make_pass(model, batch, stage) for stage in stages}
    times = {stage: Times() for stage in stages}
    for turn in range(repeats + 1):
        # Another one begins each turn: nobody always runs on caches left by the same neighbour.
        first = turn % len(stages)
        for stage in [*stages[first:], *stages[:first]]:
            model.zero_grad()
            batch.embeds.grad = None
            moments = [_now(task.device)]
            loss = passes[stage]()
            moments.append(_now(task.device))
            loss.backward()
            moments.append(_now(task.device))
            if turn == 0:
                continue
            for part, (cpu, wall) in zip((FORWARD, WHOLE), moments[1:], strict=True):
                times[stage].cpu[part].append(cpu - moments[0][0])
                times[stage].wall[part].append(wall - moments[0][1])
    return times


def _now(device: str) -> tuple[float, float]:
    """CPU time of the process and wall time in seconds, when the device has done its work."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.process_time(), time.perf_counter()
