"""The transformers Trainer for VDIM pre-training: NAdam, the clipping rule, repeatable steps."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from llava_uhd.checkpoint.vdim import VDIM_FILE, write_published_vdim, write_vdim
from llava_uhd.config.vdim import VdimRecipe
from llava_uhd.data.sampler import SeededSampler
from llava_uhd.errors import UserError
from llava_uhd.images.feature_pictures import pyramid_picture, stack_sheets
from llava_uhd.train.guarded import GuardedTrainer
from llava_uhd.train.shares import TRAINABLE_FILE
from llava_uhd.train.vdim.build import HEADS_FILE, published_heads
from llava_uhd.train.vdim.data import Pictures, PictureSet, Transform, batches
from llava_uhd.train.vdim.draws import seed_of
from llava_uhd.train.vdim.measure import measure
from llava_uhd.train.vdim.module import VdimModule

logger = logging.getLogger(__name__)

PUBLISHED_FILE = "vdim.ckpt"
PICTURES_FOLDER = "pictures"
MEASURE_FILE = "measure.json"
SHOWN = 2  # pictures of each held-out group that are drawn


class Watch(TrainerCallback):
    """Epochs, clipping, measurements and pictures at their times.

    Args:
        trainer: whose.
    """

    def __init__(self, trainer: VdimTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tells order and cuts, which follow from it, the number of the epoch."""
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The clipping rule."""
        self.trainer.clip(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pictures and measurements between the steps."""
        config, step = self.trainer.recipe.vdim, state.global_step
        if step >= state.max_steps:
            return  # the end of the run does both
        if config.picture_every and step % config.picture_every == 0:
            self.trainer.draw(step)
        if config.measure_every and step % config.measure_every == 0:
            self.trainer.measure(step)


class VdimTrainer(GuardedTrainer):
    """Trains a `VdimModule`.

    Everything random in a step follows from (seed, step, micro-batch): a run that goes on after a
    kill repeats the unbroken one, and several processes do what one would do with accumulation.

    Args:
        recipe: of the run.
        pictures: that measure it.
        transform: of its pictures.
        **kwargs: of ``transformers.Trainer``; ``max_grad_norm`` of the arguments holds after the
            first steps, 0 for none.
    """

    train_dataset: Pictures
    model: VdimModule
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self, recipe: VdimRecipe, pictures: PictureSet, transform: Transform, **kwargs: Any
    ) -> None:
        self.recipe = recipe
        self.pictures = pictures
        self.transform = transform
        self.sampler: SeededSampler | None = None
        self._parts: dict[str, torch.Tensor] = {}
        self._count = 0
        self._micro = (-1, 0)  # step, micro-batches of it so far
        self._norm = 0.0
        arguments: TrainingArguments = kwargs["args"]
        # The library would clip all parameters together, those of the control included.
        self.later_norm, arguments.max_grad_norm = arguments.max_grad_norm, 0.0
        super().__init__(**kwargs)
        self.add_callback(Watch(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset = self.train_dataset
        self.sampler = SeededSampler(len(dataset), self.args.seed, dataset.set_epoch)
        return self.sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """NAdam over everything that learns."""
        if self.optimizer is None:
            self.optimizer = torch.optim.NAdam(
                self.model.learning(),
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay,
                momentum_decay=4e-3,
            )
        return self.optimizer

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # As in `StageTrainer`: no step too many after a kill behind the last one.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def step_seed(self) -> int:
        """Seed of the micro-batch at hand; counts it."""
        step = self.state.global_step
        number = self._micro[1] if self._micro[0] == step else 0
        self._micro = (step, number + 1)
        place = number * self.args.world_size + self.args.process_index
        return seed_of(self.args.seed, step, place)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one micro-batch; remembers its parts for the log."""
        outputs = model(inputs["pictures"], seed=self.step_seed())
        for name, value in outputs.items():
            if name != "loss":
                self._parts[name] = self._parts.get(name, torch.zeros_like(value)) + value
        self._count += 1
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def clip(self, step: int) -> None:
        """Clips the gradient of the step that is about to be taken.

        The control heads are clipped by themselves, so that they change nothing for the rest.
        """
        config = self.recipe.vdim
        limit = config.clip_norm if step < config.clip_steps else self.later_norm
        own = self.model.learning(control=False)
        others = {id(parameter) for parameter in own}
        control = [p for p in self.model.learning() if id(p) not in others]
        norm = nn.utils.clip_grad_norm_(own, limit or float("inf"))
        if control:
            nn.utils.clip_grad_norm_(control, limit or float("inf"))
        self._norm = float(norm)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the parts of the loss, means over all processes since the last entry."""
        if "loss" in logs and self._count:
            names = sorted(self._parts)
            means = torch.stack([self._parts[name] for name in names]) / self._count
            means = self.accelerator.reduce(means, "mean")
            logs |= {f"loss/{n}": round(float(v), 6) for n, v in zip(names, means, strict=True)}
            logs["grad_norm"] = self._norm
            self._parts, self._count = {}, 0
        super().log(logs, *args, **kwargs)

    def _learning_state(self) -> dict[str, torch.Tensor]:
        learning = {name for name, p in self.model.named_parameters() if p.requires_grad}
        state = self.model.state_dict()
        return {name: state[name].detach().cpu().contiguous() for name in state if name in learning}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(self._learning_state(), folder / TRAINABLE_FILE, metadata={"format": "pt"})

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        file = Path(resume_from_checkpoint) / TRAINABLE_FILE
        state = load_file(file)
        if state.keys() != self._learning_state().keys():
            raise UserError(f"{file} was written by another run: use another trainer.output_dir")
        self.model.load_state_dict(state, strict=False)

    def draw(self, step: int) -> Path | None:
        """Draws pictures and their features; on the first process only.

        Returns:
            The PNG file.
        """
        if not self.is_world_process_zero():
            return None
        folder = Path(self.args.output_dir) / PICTURES_FOLDER
        folder.mkdir(exist_ok=True)
        mode = self.model.training
        self.model.eval()
        sheets = []
        for sources in self.pictures.held_out.values():
            spread = sources[:: max(len(sources) // SHOWN, 1)][:SHOWN]
            for batch in batches(spread, self.transform, SHOWN):
                pixels = batch.to(self.args.device)
                with torch.no_grad():
                    source = self.model.features(pixels)
                    maps = self.model.upsampler.stage_maps(source, pixels)
                for index, picture in enumerate(pixels):
                    shown: dict[int | str, torch.Tensor] = {1: source[index]}
                    shown |= {scale: each[index] for scale, each in maps.items()}
                    sheets.append(pyramid_picture(self.transform.picture(picture), shown))
        self.model.train(mode)
        target = folder / f"step-{step:06d}.png"
        stack_sheets(sheets).save(target)
        return target

    def measure(self, step: int) -> list[dict[str, Any]]:
        """Measures on the held-out pictures and appends to the file; first process only."""
        if not self.is_world_process_zero():
            return []
        rows = measure(
            self.model,
            self.pictures.held_out,
            self.transform,
            self.args.per_device_train_batch_size,
            self.args.seed,
        )
        path = Path(self.args.output_dir) / MEASURE_FILE
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        kept = [entry for entry in before if entry["step"] < step]
        text = json.dumps([*kept, {"step": step, "rows": rows}], indent=1)
        path.write_text(text + "\n", encoding="utf-8")
        return rows

    def finish(self, tower: str) -> None:
        """Writes the results: the upsampler in our format and the published one, and the heads."""
        self.write_result(lambda folder: self._write(folder, tower))

    def _write(self, folder: Path, tower: str) -> None:
        if not self.args.should_save:
            return
        stack = self.model.upsampler.state_dict()
        facts = {
            "width": str(self.model.features.width),
            "scale": str(self.recipe.vdim.scale),
            "tower": tower,
            "select_layer": str(self.recipe.tower.select_layer),
            "mean": json.dumps(list(self.transform.mean)),
            "std": json.dumps(list(self.transform.std)),
        }
        write_vdim(folder / VDIM_FILE, stack, facts)
        heads = published_heads(self.model)
        save_file(heads, folder / HEADS_FILE, metadata={"format": "pt"})
        write_published_vdim(
            folder / PUBLISHED_FILE,
            stack,
            others=heads,
            settings={"lr": self.args.learning_rate, "n_jitters": self.recipe.vdim.n_jitters},
            epoch=int(self.state.epoch or 0),
            global_step=self.state.global_step,
        )
