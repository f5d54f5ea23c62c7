"""The transformers Trainer with our data order, our rates, and small checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from llava_uhd.checkpoint.parts import PROJECTOR_FILE, save_projector
from llava_uhd.checkpoint.streamed import save_streamed
from llava_uhd.config.training import Recipe
from llava_uhd.data.dataset import ConversationDataset
from llava_uhd.data.packed import PackedSampler, PackedSamples
from llava_uhd.data.sampler import BlockSampler, ModalityLengthSampler, SeededSampler
from llava_uhd.language.by_sample import prefer_by_sample
from llava_uhd.train.compression import INPUT, ScheduledCompression
from llava_uhd.train.counting import FACTS, facts_of
from llava_uhd.train.fsdp import plan_units
from llava_uhd.train.heldout import HeldOut
from llava_uhd.train.lora import LoraRun
from llava_uhd.train.loss import INPUT as LOSS_PLAN
from llava_uhd.train.loss import LossPlanner
from llava_uhd.train.meter import Meter
from llava_uhd.train.optimizers import make_optimizer
from llava_uhd.train.sharding import Sharing
from llava_uhd.train.shared_trainer import SharedTrainer
from llava_uhd.train.shares import TRAINABLE_FILE, check_same
from llava_uhd.train.stages import parameter_groups

logger = logging.getLogger(__name__)


class EpochToSampler(TrainerCallback):
    """Tells the sampler, and through it the data set, which epoch begins.

    Data loaders of several processes and of resumed runs do not always pass it on.

    Args:
        trainer: whose sampler is meant.
    """

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first batch of each epoch is drawn."""
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int(state.epoch or 0))


class StageTrainer(SharedTrainer):
    """Trains one stage of a recipe.

    While a part is frozen its weights are not written into intermediate checkpoints: they hold
    the learning parameters, the optimizer and everything else a resumed run needs.

    Args:
        recipe: of the run.
        only_projector: the finished stage is written as a projector file, not as a whole model.
        lora: the finished stage is written as a LoRA folder; None for a whole model.
        held_out: evaluates; None: nothing is held out.
        **kwargs: of ``transformers.Trainer``.
    """

    train_dataset: ConversationDataset | PackedSamples
    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(
        self,
        recipe: Recipe,
        only_projector: bool,
        lora: LoraRun | None = None,
        held_out: HeldOut | None = None,
        **kwargs: Any,
    ) -> None:
        self.recipe = recipe
        self.only_projector = only_projector
        self.lora = lora
        self.held_out = held_out
        self.sampler: SeededSampler | PackedSampler | None = None
        packed = isinstance(kwargs.get("train_dataset"), PackedSamples)
        if packed and recipe.model.attn_implementation is None:
            prefer_by_sample(kwargs["model"])
        super().__init__(**kwargs)
        self.sharing = Sharing(self.model, self.args)
        self.loss_planner = LossPlanner(recipe.trainer.loss, self.model, self.args)
        plan_units(self)
        self.meter = Meter(recipe, self.model, self.args.device)
        self.add_callback(self.meter)
        self.add_callback(EpochToSampler(self))
        self.scheduled: ScheduledCompression | None = None
        if recipe.compression.schedule is not None:
            layers = self.model.config.text_config.num_hidden_layers
            folder = Path(self.args.output_dir)
            self.scheduled = ScheduledCompression(recipe.compression, layers, folder)
            self.add_callback(self.scheduled)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any]:
        self.sampler = self._make_sampler()
        return self.sampler

    def _make_sampler(self) -> SeededSampler | PackedSampler:
        dataset = self.train_dataset
        if isinstance(dataset, PackedSamples):
            return dataset.sampler()
        by_modality = self.recipe.trainer.group_by_modality_length
        if by_modality or self.args.train_sampling_strategy == "group_by_length":
            return ModalityLengthSampler(
                dataset.modality_lengths if by_modality else dataset.lengths,
                self.args.train_batch_size,
                self.args.world_size * self.args.gradient_accumulation_steps,
                self.args.seed,
                dataset.set_epoch,
            )
        if self.recipe.data.shuffle == "shards":
            return BlockSampler(dataset.records.blocks, self.args.seed, dataset.set_epoch)
        return SeededSampler(len(dataset), self.args.seed, dataset.set_epoch)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group per part, so that each has its own rate."""
        if self.optimizer is None:
            target = self.model if model is None else model
            groups = parameter_groups(
                target,
                self.recipe.stage,
                self.args.learning_rate,
                self.args.weight_decay,
                set(self.get_decay_parameter_names(target)),
            )
            self.optimizer = make_optimizer(self.args, groups, target)
        return self.optimizer

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The library takes a step before it asks whether there is one left to take: a run that
        # was killed between its last checkpoint and its result would get one too many.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Micro-batches of the next step; a schedule says of each how the model compresses."""
        with self.meter.waiting():
            batches, learned = super().get_batch_samples(*args, **kwargs)
        if self.scheduled is not None:
            states = self.scheduled.of_step(self.state.global_step, len(batches))
            batches = [
                {**batch, INPUT: state} for batch, state in zip(batches, states, strict=True)
            ]
        return batches, learned

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """One micro-batch, counted and timed for the log."""
        self.meter.watch_engine(model)
        facts = inputs.pop(FACTS, None) or facts_of(inputs, self.model.config)
        last = self.accelerator.gradient_state.sync_gradients
        with self.meter.passing(facts, inputs.get(INPUT), last):
            return super().training_step(model, inputs, *args, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Evaluation comes here too; the model knows nothing of these counts.
        inputs = super()._prepare_inputs({k: v for k, v in inputs.items() if k != FACTS})
        return {**inputs, LOSS_PLAN: self.loss_planner(inputs)}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss and answers of what is held out."""
        assert self.held_out is not None, "nothing is held out"
        metrics = self.held_out(self)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds what the meter says of the steps since the last entry.

        With a schedule also the stage of compression.
        """
        if "loss" in logs:
            logs.update(self.meter.entry(max(self.args.world_size, 1)))
        if self.scheduled is not None:
            logs.update(self.scheduled.logged(self.state.global_step))
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        state_dict = self.sharing.tidy(self.model, state_dict)
        learning = {name for name, p in self.model.named_parameters() if p.requires_grad}
        everything = len(learning) == len(dict(self.model.named_parameters()))
        whole = self.finishing and not self.only_projector and self.lora is None
        if everything or whole:
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        state = self.model.state_dict() if state_dict is None else state_dict
        if self.finishing and self.lora is not None:
            self.lora.save(folder, self.model, self.processing_class, state)
            return
        if self.finishing:
            projector = {k: v for k, v in state.items() if k.startswith("projector.")}
            save_projector(folder / PROJECTOR_FILE, projector, self.model.config)
            self.model.config.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)
            return
        kept = {name: tensor for name, tensor in state.items() if name in learning}
        save_streamed(kept, folder / TRAINABLE_FILE)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        file = Path(resume_from_checkpoint) / TRAINABLE_FILE
        if self.is_fsdp_enabled or not file.is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        target = self.model if model is None else model
        state = load_file(file)
        check_same(state, target, file)
        target.load_state_dict(state, strict=False)

    def belongs_to_result(self, name: str) -> bool:
        """Whether the result of the stage needs a weight."""
        return not self.only_projector or name.startswith("projector.")

    def finish(self) -> None:
        """Writes the finished stage into the output folder (all ranks take part)."""
        self.finishing = True
        self.write_result(lambda folder: self.save_model(str(folder)))
