"""Operations of training, by shapes, and what part of a device's peak they come to (MFU)."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

import torch

from llava_uhd.config.model import CompressionConfig, LlavaUHDConfig
from llava_uhd.data.costs import TrainingCost
from llava_uhd.images.cost import language_shape, tower_flops
from llava_uhd.images.cost_projectors import PROJECTOR_COSTS, Convention
from llava_uhd.language.compressed import is_active
from llava_uhd.language.compressors import COMPRESSORS
from llava_uhd.language.runs import Run
from llava_uhd.train.counting import Facts

CONVENTION = (
    "Model FLOPs: matrix products only, a multiply-add is 2. A part that learns counts three "
    "forward passes, one that is frozen but passes gradients on two (so does one that learns "
    "through adapters), one at rest one. Attention of the language model is causal (half of the "
    "square) and stays inside each sample; logits count at learned positions. Padding and what "
    "gradient checkpointing computes again do not count."
)

# Dense bf16 with float32 accumulation, in operations per second, by what the driver calls the
# device; the first name that it contains counts. Source: the maker's data sheets.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class PartFlops:
    """Operations of a training pass, forward and backward.

    Attributes:
        tower: vision tower.
        projector: projector with its upsampler.
        language: language model with its head.
    """

    tower: float = 0.0
    projector: float = 0.0
    language: float = 0.0

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.tower + self.projector + self.language

    def __add__(self, other: PartFlops) -> PartFlops:
        return PartFlops(
            self.tower + other.tower,
            self.projector + other.projector,
            self.language + other.language,
        )


class TrainingFlops:
    """Counts the operations of micro-batches, see `CONVENTION`.

    Args:
        config: of the model.
        learn: parts that learn, as in ``stage.learn``.
        adapters: the language model learns through adapters.

    Raises:
        UserError: a language model without a formula.
    """

    def __init__(
        self, config: LlavaUHDConfig, learn: Collection[str], adapters: bool = False
    ) -> None:
        self.config = config
        self.shape = language_shape(config.text_config)
        self.passes = TrainingCost.of(config.text_config, learn, adapters)

    def __call__(self, facts: Facts, compression: CompressionConfig | None = None) -> PartFlops:
        """Operations of a micro-batch.

        Args:
            facts: of it.
            compression: of its pass.

        Raises:
            UserError: a tower or projector without a formula.
        """
        tower = projector = 0.0
        if facts.grids:
            tower = float(tower_flops(self.config, facts.grids))
            cost = PROJECTOR_COSTS.get(self.config.projector.type)
            projector = float(cost.flops(self.config, facts.grids, Convention()))
        language = self.forward(facts, compression)
        passes = self.passes
        return PartFlops(
            passes.tower * tower, passes.projector * projector, passes.language * language
        )

    def forward(self, facts: Facts, compression: CompressionConfig | None = None) -> float:
        """Operations of a forward pass of the language model.

        Example: a body of 1000 weights in 2 layers, 1 head of width 8, a head of 5 x 8 weights;
        one sample of 10 tokens, 3 of them learned: 2 * 1000 * 10 + 2 * 2 * 8 * 10**2 + 2 * 40 * 3.
        """
        shape = self.shape
        whole = shape.layers
        if compression is not None and is_active(compression, shape.layers):
            whole = max(compression.layer, 0)
        total = whole * self._layer(facts.lengths)
        if whole < shape.layers and compression is not None:
            shorter = shortened(facts, compression)
            total += (shape.layers - whole) * self._layer(shorter)
        return total + 2.0 * shape.vocabulary * shape.width * facts.learned

    def _layer(self, lengths: Collection[int]) -> float:
        shape = self.shape
        linear = 2.0 * shape.body_weights / shape.layers * sum(lengths)
        square = 2.0 * shape.heads * shape.head_width * sum(length**2 for length in lengths)
        return linear + square


def shortened(facts: Facts, compression: CompressionConfig) -> list[int]:
    """Tokens of each sample behind the layer that compresses."""
    keep = compression.remainder == "keep"
    runs = facts.runs or [()] * facts.samples
    return [
        length
        - sum(
            run.length - kept_tokens(compression.method, run, compression.stride, keep)
            for run in found
        )
        for length, found in zip(facts.lengths, runs)
    ]


@lru_cache(maxsize=4096)
def kept_tokens(method: str, run: Run, stride: int, keep: bool) -> int:
    """Tokens that a compressor leaves of a run; how many never depends on its scores."""
    groups = COMPRESSORS.get(method).groups(run, stride, keep, torch.zeros(run.length))
    return int(groups.max()) + 1 if run.length else 0


@dataclass(frozen=True)
class Peak:
    """What a device could compute.

    Attributes:
        flops: operations per second; None: not known.
        source: where the figure comes from, or why there is none.
    """

    flops: float | None
    source: str


def device_peak(device: torch.device) -> Peak:
    """Peak of a device: a table's for GPUs, measured on a CPU."""
    if device.type == "cuda":
        return peak_of(torch.cuda.get_device_name(device))
    if device.type == "cpu":
        threads = torch.get_num_threads()
        text = f"measured: float32 product of 512 x 512 matrices, {threads} thread(s)"
        return Peak(measured_peak(), text)
    return Peak(None, f"no peak is known for devices of type {device.type}")


def peak_of(name: str) -> Peak:
    """Peak of a GPU by its name.

    Example: ``peak_of("NVIDIA H100 80GB HBM3").flops`` is 989e12.
    """
    for part, flops in PEAKS.items():
        if part in name:
            return Peak(flops, f"{name}: {flops / 1e12:.0f} TFLOP/s dense bf16 (data sheet)")
    return Peak(None, f"{name}: no peak in the table of this package, so there is no MFU")


def measured_peak(size: int = 512, repeats: int = 6) -> float:
    """Operations per second of the best of some float32 products of square matrices."""
    left = torch.ones(size, size)
    result = torch.empty(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(left, left, out=result)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
