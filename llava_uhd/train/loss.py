"""Which form of the loss a run takes, and how its processes agree on the number of pieces."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from llava_uhd.errors import UserError
from llava_uhd.language.decoder import IGNORE_INDEX, LogitRule, logit_rule
from llava_uhd.language.loss import Form, LossPlan, plan_chunks
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.train.preflight import sharing_plan

# Key of the model's inputs.
INPUT = "loss_plan"


def check_loss(form: str, arguments: TrainingArguments) -> None:
    """Refuses a form that this run cannot take, before anything is loaded.

    Args:
        form: ``trainer.loss``.
        arguments: of the run.

    Raises:
        UserError: Liger's kernels are missing, have no GPU, or the weights are shared out.
    """
    if form != "liger":
        return
    instead = "take --trainer.loss chunked, which runs everywhere"
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "trainer.loss: liger needs the package liger-kernel: bash install.sh --extras "
            f"train,liger; or {instead}"
        )
    if not torch.cuda.is_available():
        raise UserError(f"trainer.loss: liger needs a CUDA device, there is none: {instead}")
    if sharing_plan(arguments).stage >= 3:
        raise UserError(
            "trainer.loss: liger reads the weights of the head, which ZeRO-3 and FSDP share out "
            f"over devices: {instead}, or --deepspeed zero2"
        )


def check_head(form: str, head: nn.Module, rule: LogitRule) -> None:
    """Refuses a head that Liger's kernels cannot read, and what they are not tried with.

    Raises:
        UserError: it has adapters, is quantised or is no linear layer, or logits are bounded.
    """
    if form != "liger":
        return
    if type(head) is not nn.Linear:
        raise UserError(
            f"trainer.loss: liger needs a plain linear head, this model's is a "
            f"{type(head).__name__}: take --trainer.loss chunked"
        )
    if rule.cap is not None:
        raise UserError(
            "trainer.loss: liger is not tried with language models that bound their logits "
            f"(final_logit_softcapping {rule.cap:g}): take --trainer.loss chunked"
        )


class LossPlanner:
    """Says for each micro-batch how its loss is computed.

    Args:
        form: ``trainer.loss``.
        model: of the run.
        arguments: of the run.

    Raises:
        UserError: see `check_loss` and `check_head`.
    """

    def __init__(
        self, form: Form, model: LlavaUHDForConditionalGeneration, arguments: TrainingArguments
    ) -> None:
        check_loss(form, arguments)
        rule = logit_rule(model.config.text_config)
        check_head(form, model.get_output_embeddings(), rule)
        self.form = form
        self.vocabulary = rule.vocabulary
        self.device = arguments.device
        # Each call of the head gathers its weights from all processes: equally many calls.
        self.agrees = sharing_plan(arguments).stage >= 3 and arguments.world_size > 1

    def __call__(self, inputs: Mapping[str, Any]) -> LossPlan:
        """The plan of a micro-batch; all processes ask at the same time.

        Args:
            inputs: with ``labels`` (B, T).
        """
        if not self.agrees or self.form not in ("auto", "chunked"):
            return LossPlan(self.form)
        most = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum().to(self.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        chunks = plan_chunks(self.form, int(most), self.vocabulary)
        # A power of two: the order of the modules, by which DeepSpeed fetches weights ahead,
        # changes seldom.
        return LossPlan(self.form, 1 << (chunks - 1).bit_length())
