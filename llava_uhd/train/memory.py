"""What a training run needs in memory and on disk, estimated from shapes before it starts.

The terms are those of the ZeRO paper (arXiv 1910.02054) for weights, gradients and optimizer, and
the tensors that the layers of transformers keep for their backward pass for activations. Workspaces
of kernels, fragmentation and buffers of communication are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.images.cost import LanguageShape, built_tower_layers, language_shape, tower_shape
from llava_uhd.images.geometry import Size
from llava_uhd.language.loss import plan_chunks

# Optimizer -> bytes that it keeps for each learning value, beside a master copy. Names are those of
# ``trainer.optim``; others are taken for AdamW.
OPTIMIZER_BYTES = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_apex_fused"), 8),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), 2),
    **dict.fromkeys(("sgd", "adafactor"), 0),
    "lion_32bit": 4,
}
# Held in memory of the host.
PAGED = ("paged_adamw_8bit", "paged_adamw_32bit", "paged_adamw")


@dataclass(frozen=True)
class SharingPlan:
    """How the state of training is shared out.

    Attributes:
        devices: processes.
        stage: of ZeRO; 0: everything lies on every device, 1: optimizer shared, 2: gradients too,
            3: weights too (FSDP is the same).
        offload: the optimizer's state lies in the host's memory.
        gathered: bytes of a value of weights that lie whole beside the shares from the forward to
            the end of the backward pass (FSDP's "shard_grad_op"); 0: few layers at a time do.
        all_away: with ``offload``, shares of weights and gradients lie there, too (FSDP).
    """

    devices: int = 1
    stage: int = 0
    offload: bool = False
    gathered: int = 0
    all_away: bool = False

    def share(self, size: float, from_stage: int) -> float:
        """Bytes on a device of what is shared out from a stage on."""
        return size / self.devices if self.stage >= from_stage else size


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a device.

    Attributes:
        slots: positions of the language model, padding included.
        learned: of them, those with logits.
        grids: (rows, columns) of patches of its views.
    """

    slots: int
    learned: int
    grids: Sequence[Size] = ()


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: as they are loaded.
        gradients: of the learning parameters.
        optimizer: moments, and float32 masters of half-precision weights.
        activations: kept for the backward pass.
        logits: those that exist at a time, with what the softmax keeps and their gradients.
    """

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0

    @property
    def state(self) -> float:
        """What does not depend on the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """Everything."""
        return sum(getattr(self, item.name) for item in fields(self))


def state_memory(
    model: nn.Module, plan: SharingPlan, optimizer: str = "adamw_torch", masters: bool = False
) -> Memory:
    """Weights, gradients and optimizer of a model whose learning parts are chosen.

    Args:
        model: its parameters say what learns, and their dtypes.
        plan: how they are shared out.
        optimizer: ``trainer.optim``.
        masters: float32 copies of the learning weights are kept (DeepSpeed with bfloat16).
    """
    weights = gradients = learning = values = 0.0
    for parameter in model.parameters():
        values += parameter.numel()
        size = parameter.numel() * parameter.element_size()
        weights += size
        if parameter.requires_grad:
            gradients += size
            learning += parameter.numel()
    each = OPTIMIZER_BYTES.get(optimizer, 8) + (4 if masters else 0)
    away = plan.offload or optimizer in PAGED
    if plan.offload and plan.all_away:
        return Memory()
    return Memory(
        weights=plan.share(weights, 3) + plan.gathered * values,
        gradients=plan.share(gradients, 2),
        optimizer=0.0 if away else plan.share(learning * each, 1),
    )


def batch_memory(
    config: LlavaUHDConfig,
    batch: Batch,
    learns: Mapping[str, bool],
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    loss: str = "whole",
) -> Memory:
    """Activations and logits of one micro-batch.

    Args:
        config: of the model.
        batch: of a device.
        learns: part -> whether it learns: ``vision_tower``, ``projector``, ``language_model``.
        dtype: of the computation.
        checkpointing: layers keep their inputs only; one at a time is computed again.
        loss: ``trainer.loss``.
    """
    size = dtype.itemsize
    language = language_shape(config.text_config)
    layer = batch.slots * layer_bytes(language, size, learns.get("language_model", False))
    kept = batch.slots * language.width * size
    activations = _layers(language.layers, layer, kept, checkpointing)
    if learns.get("vision_tower"):
        activations += _tower_activations(config, batch.grids, size, checkpointing)
    learning = learns.get("language_model", False)
    sizes = (batch.learned, language.vocabulary, language.width)
    logits = logit_bytes(*sizes, size, loss, learning)
    return Memory(activations=activations, logits=logits)


def logit_bytes(
    rows: int, vocabulary: int, width: int, size: int, form: str, learns: bool
) -> float:
    """Bytes that the loss takes beside the gradient of the head.

    At its peak, in the backward pass, each logit is there three times in float32: its logarithm of
    the softmax, and the gradients of that and of the logit. Under "chunked" these are of one piece;
    later the head's gradient of that piece is there beside the sum and the gradient of its logits.
    Liger's kernels keep logits in the dtype of the computation, about as many as the states of all
    learned tokens have values, and sum the head's gradient in float32.

    Args:
        rows: learned tokens.
        vocabulary: logits of each.
        width: of the language model.
        size: bytes of a value in the computation.
        form: ``trainer.loss``.
        learns: the head does.
    """
    table = float(vocabulary * width) if learns else 0.0
    if form == "liger":
        return rows * width * size * 2.0 + table * (4 if size < 4 else 0)
    pieces = plan_chunks(form, rows, vocabulary)
    logits = -(-rows // pieces) * vocabulary * 4.0
    return 3 * logits if pieces == 1 else max(3 * logits, logits + table * size)


def layer_bytes(shape: LanguageShape, size: int, learns: bool) -> float:
    """Bytes per position that a decoder layer keeps for its backward pass.

    Norms keep float32; a frozen linear layer does not keep its input.

    Args:
        shape: of the decoder.
        size: bytes of a value.
        learns: its weights learn (through adapters, too).
    """
    inner, kv = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    attention = 2 * inner + 2 * kv  # rotated queries and keys, values, the result
    gated = 3 * shape.mlp_width  # gate, its activation, the other branch
    norms = 2 * 4 * shape.width
    if not learns:
        return norms + size * (attention + gated)
    inputs = 2 * shape.width + inner + shape.mlp_width  # of the linear layers
    normalised = 2 * size * shape.width
    return norms + normalised + size * (attention + gated + inputs)


def _layers(count: int, each: float, kept: float, checkpointing: bool) -> float:
    # Beside the layers the last norm keeps its input twice.
    return (count + 2) * kept + each if checkpointing else count * each + 2 * kept


def _tower_activations(
    config: LlavaUHDConfig, grids: Sequence[Size], size: int, checkpointing: bool
) -> float:
    """Of a tower that learns; a frozen one keeps nothing."""
    shape = tower_shape(config.vision_config)
    tokens = sum(rows * columns + shape.class_token for rows, columns in grids)
    # Two norms (input and result), queries, keys, values, the result and its copy, two wide ones.
    each = tokens * size * (4 * shape.width + 5 * shape.width + 2 * shape.mlp_width)
    kept = tokens * shape.width * size
    return _layers(built_tower_layers(config), each, kept, checkpointing)


def checkpoint_bytes(
    model: nn.Module, optimizer: str = "adamw_torch", masters: bool = False
) -> float:
    """Bytes of a checkpoint in the middle of a run: what learns, and its optimizer.

    Args:
        model: see `state_memory`.
        optimizer: see `state_memory`.
        masters: see `state_memory`.
    """
    kept = OPTIMIZER_BYTES.get(optimizer, 8) + (4 if masters else 0)
    learning = [each for each in model.parameters() if each.requires_grad]
    return float(sum(each.numel() * (each.element_size() + kept) for each in learning))


def model_bytes(model: nn.Module, whole: bool = True) -> float:
    """Bytes of the weights, or only of those that learn."""
    kept = [each for each in model.parameters() if whole or each.requires_grad]
    return float(sum(each.numel() * each.element_size() for each in kept))
