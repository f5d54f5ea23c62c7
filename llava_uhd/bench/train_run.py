"""Training steps of a recipe on random weights of its real shape, measured by its own trainer."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from llava_uhd.bench.train_data import Mix, draw, write_data
from llava_uhd.checkpoint.assemble import Assembled
from llava_uhd.checkpoint.recipe_parts import language_config, parts_config, tower_config
from llava_uhd.checkpoint.shapes import describe_recipe
from llava_uhd.config.compression import after_training
from llava_uhd.config.training import ModelSection, Recipe
from llava_uhd.data.dataset import ConversationDataset, open_records
from llava_uhd.data.packed import PackedSamples
from llava_uhd.errors import UserError
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.train.__main__ import build_trainer
from llava_uhd.train.embedded import demo_tokenizer
from llava_uhd.train.fsdp import keep_masters
from llava_uhd.train.log import read_log
from llava_uhd.train.lora import add_adapters, finish_adapters
from llava_uhd.train.meter import TIME
from llava_uhd.train.packed import pack, rows_of_device
from llava_uhd.train.record import read_record
from llava_uhd.train.record_callbacks import ShortPrinter, ShortProgress
from llava_uhd.train.setup import deepspeed_config, training_arguments, weight_dtype, world_size
from llava_uhd.train.stages import apply_stage
from llava_uhd.train.timing import PARTS

PADDED, GROUPED, PACKED = "padded", "grouped", "packed"
BATCHINGS = {
    PADDED: "rows of their own in random order, padded to the longest of a batch",
    GROUPED: "the same, batches of like length (the published group_by_modality_length)",
    PACKED: "side by side in rows of a fixed number of tokens",
}
# Samples that a plan of rows chooses from: fewer would fill rows worse than real data do.
LEAST_SAMPLES = 768


@dataclass(frozen=True)
class Cuts:
    """What a model is cut to, to fit the machine; None leaves it as it is.

    Attributes:
        layers: of the language model.
        hidden: its width; heads keep theirs, the MLP keeps its proportion.
        tower_layers: of the vision tower.
    """

    layers: int | None = None
    hidden: int | None = None
    tower_layers: int | None = None

    @property
    def any(self) -> bool:
        """Whether anything is cut."""
        return any(value is not None for value in dataclasses.astuple(self))


@dataclass(frozen=True)
class TrainTask:
    """What is measured.

    Attributes:
        recipe: to be trained, its data replaced by drawn ones.
        batching: of `BATCHINGS`.
        mix: of the lengths of samples.
        steps: that are measured.
        warmup: steps before them.
        batch: samples per device and pass (packed: their average number).
        accumulated: passes of a step.
        cuts: of the model.
        threads: of the CPU; None: as many as the library takes.
    """

    recipe: Recipe
    batching: str
    mix: Mix
    steps: int = 8
    warmup: int = 2
    batch: int = 1
    accumulated: int = 1
    cuts: Cuts = Cuts()
    threads: int | None = None

    @property
    def samples(self) -> int:
        """How many are drawn."""
        needed = (self.steps + self.warmup) * self.batch * self.accumulated * world_size()
        return max(LEAST_SAMPLES, 2 * needed)


class ProcessClock(TrainerCallback):
    """CPU time of the process at the end of each step, which other programs disturb little."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins."""
        self.moments = [time.process_time()]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes a step."""
        self.moments.append(time.process_time())

    def per_second(self, task: TrainTask, entries: list[dict[str, Any]], key: str) -> float:
        """A speed of the log per second of CPU time, over all measured steps."""
        count = sum(entry[key] * entry["step_seconds"] for entry in entries[task.warmup :])
        return float(count / (self.moments[-1] - self.moments[task.warmup]))


def measure_alone(task: TrainTask) -> dict[str, Any]:
    """`measure` in a process of its own, whose memory is that of this task alone."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, task).result()


def measure(task: TrainTask) -> dict[str, Any]:
    """Trains some steps in a temporary folder.

    Returns:
        Figures of the measured steps, ready for JSON, see `figures`.

    Raises:
        UserError: a recipe that cannot be measured, or whose model does not fit.
    """
    # Tables are on the screen, not what libraries say of few processors or of no GPU.
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", UserWarning)
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    with tempfile.TemporaryDirectory(prefix="llava_uhd_bench_") as name:
        try:
            return _measure(task, Path(name))
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(
                f"{task.recipe.name} does not fit the device ({str(error).splitlines()[0]}): cut "
                "it with --layers, or lower --batch"
            ) from error


def _measure(task: TrainTask, folder: Path) -> dict[str, Any]:
    recipe = bench_recipe(task, folder)
    deepspeed, packed = deepspeed_config(recipe), task.batching == PACKED
    arguments = training_arguments(recipe, deepspeed, rows=1 if packed else None)
    set_seed(arguments.seed)
    dtype = weight_dtype(recipe, deepspeed)
    parts = random_model(recipe, dtype, arguments.device, task.cuts)
    file = write_data(folder, draw(task.mix, task.samples), task.mix, parts.processor)
    data = dataclasses.replace(recipe.data, path=str(file), image_folder=str(folder))
    recipe = dataclasses.replace(recipe, data=data)
    add_adapters(parts.model, recipe.lora)
    apply_stage(parts.model, recipe.stage)
    finish_adapters(parts.model, recipe.lora, arguments)
    keep_masters(parts.model, arguments)
    run = Path(recipe.output_dir)
    run.mkdir(exist_ok=True)
    dataset = ConversationDataset(open_records(data), parts.processor, data, arguments.seed)
    samples: ConversationDataset | PackedSamples = dataset
    if packed:
        samples = pack(recipe, arguments, parts.model.config, dataset, run, False)
        arguments = training_arguments(recipe, deepspeed, rows_of_device(samples.packing))
    trainer = build_trainer(recipe, arguments, parts, samples, run)
    clock = ProcessClock()
    trainer.add_callback(clock)
    for printer in (ShortPrinter, ShortProgress):
        trainer.remove_callback(printer)
    if arguments.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(arguments.device)
    trainer.train()
    entries = [entry for entry in read_log(run) if "step_seconds" in entry]
    shape = {
        "parameters": sum(p.numel() for p in parts.model.parameters()),
        "learning": sum(p.numel() for p in parts.model.parameters() if p.requires_grad),
        "layers": parts.model.config.text_config.num_hidden_layers,
        "hidden": parts.model.config.text_config.hidden_size,
        "dtype": str(dtype).removeprefix("torch."),
    }
    fill = samples.packing.report(0).fill if isinstance(samples, PackedSamples) else None
    found = figures(task, entries)
    if arguments.device.type == "cpu" and torch.get_num_threads() == 1:
        found["tokens_per_cpu_second"] = clock.per_second(task, entries, "tokens_per_second")
        found["samples_per_cpu_second"] = clock.per_second(task, entries, "samples_per_second")
    return {**found, **shape, "fill": fill, "record": read_record(run)}


def bench_recipe(task: TrainTask, folder: Path) -> Recipe:
    """The task's recipe for some steps in a folder, without files that nobody reads.

    Raises:
        UserError: it keeps quantised weights, which random ones have no use for.
    """
    recipe = task.recipe
    if recipe.lora.quantization is not None:
        raise UserError(
            f"{recipe.name} keeps quantised weights, which the bench does not build: measure it "
            'with --overrides "--lora.quantization null"'
        )
    arguments = {
        **recipe.trainer.arguments,
        "max_steps": task.warmup + task.steps,
        "num_train_epochs": 1,
        "per_device_train_batch_size": task.batch,
        "gradient_accumulation_steps": task.accumulated,
        "train_sampling_strategy": "random",
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = dataclasses.replace(
        recipe.trainer,
        output_dir=str(folder / "run"),
        global_batch_size=None,
        group_by_modality_length=task.batching == GROUPED,
        arguments=arguments,
    )
    # As many tokens in a row as a padded batch has on average, whatever the recipe says.
    data = dataclasses.replace(
        recipe.data,
        embedded=None,
        path=str(folder / "samples.json"),
        image_folder=str(folder),
        batching="packed" if task.batching == PACKED else "padded",
        pack_tokens=recipe.data.pack_tokens if task.batching == PACKED else None,
        preview=0,
        check_files=False,
    )
    return dataclasses.replace(recipe, data=data, trainer=trainer)


def random_model(
    recipe: Recipe, dtype: torch.dtype, device: torch.device, cuts: Cuts = Cuts()
) -> Assembled:
    """A model of a recipe's shape with initial values, made on its device, and its processor.

    Nothing is read or fetched: shapes come from the recipe, from ``config.json`` where a folder is
    at hand, or from the package's table of well-known models. Texts are those of the
    demonstration's tokenizer, in a vocabulary of the real size.

    Raises:
        UserError: a part whose shape is not known, or a cut that does not fit it.
    """
    section = shape_section(recipe, cuts)
    text, tokenizer = language_config(section, demo_tokenizer)
    config = parts_config(section, text, tower_config(section))
    compression = recipe.compression
    config.compression = after_training(compression, config.compression, text.num_hidden_layers)
    processor = LlavaUHDProcessor.from_parts(tokenizer, config)
    options: dict[str, Any] = {"dtype": dtype}
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    with torch.device(device):
        model = LlavaUHDForConditionalGeneration._from_config(config, **options)
    return Assembled(model.to(device, dtype), processor, ("everything",))


def shape_section(recipe: Recipe, cuts: Cuts) -> ModelSection:
    """A recipe's model section with configurations in the place of folders.

    Raises:
        UserError: see `random_model`.
    """
    section, known = recipe.model, describe_recipe(recipe)
    language, tower = section.language_model, section.vision_tower
    if not isinstance(language, dict):
        language = _plain(known.text_config.to_dict())
    if not isinstance(tower, dict):
        tower = _plain(known.vision_config.to_dict())
    return dataclasses.replace(
        section,
        checkpoint=None,
        language_model=cut_language(language, cuts),
        vision_tower=tower | _layers(cuts.tower_layers),
        tokenizer=None,
        projector_file=None,
        upsampler_file=None,
        select_layer=known.select_layer,
        projector=known.projector,
        image=dataclasses.replace(known.image, image_token_id=None, comma_id=None, newline_id=None),
        video=known.video,
    )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what follows from its depth and without ids of its tokenizer."""
    dropped = ("layer_types", "max_window_layers", "bos_token_id", "eos_token_id", "pad_token_id")
    return {k: v for k, v in values.items() if k not in dropped and v is not None}


def _layers(count: int | None) -> dict[str, int]:
    return {} if count is None else {"num_hidden_layers": count}


def cut_language(values: dict[str, Any], cuts: Cuts) -> dict[str, Any]:
    """A language model's configuration, cut.

    Raises:
        UserError: a width that its heads do not fit.
    """
    values = values | _layers(cuts.layers)
    if cuts.hidden is None:
        return values
    width, heads = int(values["hidden_size"]), int(values["num_attention_heads"])
    head = int(values.get("head_dim") or width // heads)
    few = cuts.hidden // head
    groups = heads // int(values.get("num_key_value_heads") or heads)
    if few < 1 or cuts.hidden % head or few % groups:
        raise UserError(
            f"--hidden {cuts.hidden}: the heads have width {head} and share keys by {groups}: use "
            f"a multiple of {head * groups}"
        )
    mlp = -(-int(values["intermediate_size"]) * cuts.hidden // width // 32) * 32
    return values | {
        "hidden_size": cuts.hidden,
        "intermediate_size": mlp,
        "num_attention_heads": few,
        "num_key_value_heads": few // groups,
    }


def figures(task: TrainTask, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """What the measured steps come to.

    Speeds are sums over all measured steps: batches differ in size.

    Args:
        task: that was measured.
        entries: of the log, one for each step.

    Raises:
        UserError: fewer steps than the task has.
    """
    measured = entries[task.warmup :]
    if not measured:
        raise UserError(f"{task.recipe.name}: no step was measured after {task.warmup} of warm-up")
    seconds = [entry["step_seconds"] for entry in measured]
    total = sum(seconds)

    def per_second(key: str) -> float:
        return float(sum(e[key] * e["step_seconds"] for e in measured) / total)

    found: dict[str, Any] = {
        "recipe": task.recipe.name,
        "batching": task.batching,
        "steps": len(measured),
        "step_seconds_median": statistics.median(seconds),
        "step_seconds_best": min(seconds),
        "samples_per_second": per_second("samples_per_second"),
        "tokens_per_second": per_second("tokens_per_second"),
        "visual_tokens_per_second": per_second("visual_tokens_per_second"),
        "learned_tokens_per_second": per_second("learned_tokens_per_second"),
        "padding": statistics.fmean(entry["padding"] for entry in measured),
        "peak_memory_gib": measured[-1].get("peak_memory_gib"),
        "parts": {part: sum(e[f"{TIME}{part}"] for e in measured) / total for part in PARTS},
    }
    for key in ("tflops_per_second", "mfu"):
        found[key] = per_second(key) if all(key in entry for entry in measured) else None
    found["data_wait"] = found["parts"]["data"]
    return found
