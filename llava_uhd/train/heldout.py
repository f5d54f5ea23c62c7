"""Evaluation while a run trains: the loss of samples that it never learns, and answers to some.

Nothing of it reaches the training: random numbers, the order of the data and the state of the model
are afterwards what they were before.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from llava_uhd.config.training import Recipe
from llava_uhd.data.dataset import ConversationDataset
from llava_uhd.data.records import Records
from llava_uhd.errors import UserError
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.encoding import IGNORE_INDEX
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.text.prompting import StopOnText, cut_at_stop, extra_stops, prompt_text
from llava_uhd.text.templates import IMAGE_MARKER, VIDEO_MARKER
from llava_uhd.train.heldout_page import Answer, append_answers
from llava_uhd.train.preview import spread
from llava_uhd.train.signals import QuietWorker
from llava_uhd.train.start import is_first_rank

# Without trainer.eval_steps there is an evaluation after each tenth of the steps.
EVAL_SHARE = 0.1
MAX_NEW_TOKENS = 64

Collate = Callable[[Sequence[Any]], dict[str, torch.Tensor]]


def evaluation_arguments(recipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the trainer that evaluation needs.

    Args:
        recipe: of the run.
        arguments: that the recipe sets.

    Returns:
        Those to add.

    Raises:
        UserError: an evaluation without data.
    """
    strategy = arguments.get("eval_strategy")
    asked = str(getattr(strategy, "value", strategy) or "no") != "no"
    holds_out = bool(getattr(recipe.data, "holds_out", False))
    if not holds_out:
        if asked:
            raise UserError(
                f"trainer.eval_strategy is {strategy}, but nothing is held out: set data.holdout "
                "(0.01) or data.holdout_path"
            )
        return {}
    if strategy is not None:
        return {}
    return {"eval_strategy": "steps", "eval_steps": arguments.get("eval_steps") or EVAL_SHARE}


def held_out_dataset(
    records: Records | None, processor: LlavaUHDProcessor, recipe: Recipe, seed: int
) -> ConversationDataset | None:
    """The samples that are evaluated, as they are; None: there are none.

    Args:
        records: held out.
        processor: of the model.
        recipe: of the run.
        seed: of the run.
    """
    if records is None:
        return None
    data = dataclasses.replace(recipe.data, six_slice_probability=0.0, max_broken=1.0)
    return ConversationDataset(records, processor, data, seed)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts random numbers and the modes of all modules back to where they were."""
    # What libraries draw from, so the old kind too.
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)


class HeldOut:
    """Evaluates a run.

    Args:
        dataset: of the samples that are held out.
        collate: makes batches of them.
        folder: output folder of the run.
    """

    def __init__(self, dataset: ConversationDataset, collate: Collate, folder: Path) -> None:
        self.dataset = dataset
        self.collate = collate
        self.folder = folder

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        """Loss and answers at the step at hand; all processes take part.

        Returns:
            ``eval_loss`` per learned token, ``eval_samples``, ``eval_seconds``.
        """
        began = time.perf_counter()
        step = trainer.state.global_step
        # Broken files are counted by epoch: here by evaluation.
        self.dataset.set_epoch(step)
        with undisturbed(trainer.model), torch.no_grad():
            metrics = self.loss(trainer)
            answers = self.answers(trainer)
        if answers and is_first_rank():
            append_answers(self.folder, step, metrics.get("eval_loss"), answers)
        metrics["eval_seconds"] = round(time.perf_counter() - began, 3)
        return metrics

    # --- loss -------------------------------------------------------------------------------------

    def loss(self, trainer: Trainer) -> dict[str, float]:
        """Mean loss of all learned tokens, over all processes."""
        model = running_model(trainer)
        sums = torch.zeros(2, dtype=torch.float64, device=trainer.args.device)
        for batch, counts in self._batches(trainer):
            inputs = trainer._prepare_inputs(batch)
            with trainer.compute_loss_context_manager():
                # A sum, so that samples of all lengths count by their learned tokens.
                total = model(**inputs, num_items_in_batch=1).loss
            learned = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
            if counts and learned > 0:
                sums += torch.stack([total.double(), learned.double()])
        total, learned = trainer.accelerator.reduce(sums, "sum").tolist()
        if learned == 0:
            raise UserError(
                "no held-out sample has a learned token: name others with data.holdout_path, or "
                "raise data.max_length"
            )
        return {"eval_loss": total / learned, "eval_samples": len(self.dataset)}

    def _batches(self, trainer: Trainer) -> Iterator[tuple[dict[str, torch.Tensor], bool]]:
        """Batches of this process, and whether each counts.

        All processes have equally many, because each takes part in every pass of the others.
        """
        size, world = trainer.args.eval_batch_size, max(trainer.args.world_size, 1)
        indices = list(range(len(self.dataset)))
        batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        rank = trainer.args.process_index
        rounds = -(-len(batches) // world)
        own = [batches[(turn * world + rank) % len(batches)] for turn in range(rounds)]
        counts = [turn * world + rank < len(batches) for turn in range(rounds)]
        loader: DataLoader[Any] = DataLoader(
            self.dataset,  # type: ignore[arg-type]
            batch_sampler=own,
            collate_fn=self.collate,
            num_workers=trainer.args.dataloader_num_workers,
            worker_init_fn=QuietWorker(None),
            generator=torch.Generator(),
        )
        yield from zip(loader, counts, strict=True)

    # --- answers ----------------------------------------------------------------------------------

    def answers(self, trainer: Trainer) -> list[Answer]:
        """The first answers of some samples, spread over all of them.

        Every process generates the same ones: parts of the model may lie with others.
        """
        found = []
        for index in spread(len(self.dataset), self.dataset.config.holdout_samples):
            try:
                found.append(self.answer(trainer, index))
            except UserError:
                continue  # a broken file: the loss has told, or stopped
        return found

    def answer(self, trainer: Trainer, index: int) -> Answer:
        """The model's first answer of a sample.

        Raises:
            UserError: a file cannot be read.
        """
        dataset, model = self.dataset, trainer.model
        record, processor = dataset.records[index], dataset.processor
        assert isinstance(model, LlavaUHDForConditionalGeneration)
        turn = record.turns[0]
        images = record.images[: turn.text.count(IMAGE_MARKER)]
        videos = record.videos[: turn.text.count(VIDEO_MARKER)] if record.videos else ()
        inputs = processor(
            text=[prompt_text(processor.template, [turn])],
            images=[list(images)] if images else None,
            videos=[list(videos)] if videos else None,
            overview_only=dataset.config.overview_only,
        ).to(model.device)
        width = inputs["input_ids"].shape[1]
        stops = extra_stops(processor.template, processor.tokenizer)
        stopping = [StopOnText(processor.tokenizer, stops, width)] if stops else None
        most = self._room(model, width)
        with trainer.compute_loss_context_manager():
            rows = model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=most,
                stopping_criteria=stopping,
                use_cache=True,
                synced_gpus=trainer.args.world_size > 1,
            )
        text = processor.tokenizer.decode(rows[0, width:], skip_special_tokens=True)
        where = dataset.records.where(index)
        generated = cut_at_stop(text, stops).strip()
        return Answer(where, turn.text, record.turns[1].text, generated, images, videos)

    @staticmethod
    def _room(model: LlavaUHDForConditionalGeneration, width: int) -> int:
        """Tokens that an answer may have."""
        context = getattr(model.config.text_config, "max_position_embeddings", None)
        if context is None:
            return MAX_NEW_TOKENS
        if width >= context:
            raise UserError(f"the prompt has {width} tokens, the model takes {context}")
        return int(min(MAX_NEW_TOKENS, context - width))


def running_model(trainer: Trainer) -> nn.Module:
    """The model as its engine runs it, where parts of it lie with other processes."""
    shared = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    model: nn.Module = trainer.model_wrapped if shared else trainer.model
    return model
