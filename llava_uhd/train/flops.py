"""Operations of training, by shapes, and what part of a device's peak they come to (MFU)."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from llava_uhd.config.model import CompressionConfig, LlavaUHDConfig
from llava_uhd.config.training import UPSAMPLER_PARTS
from llava_uhd.images.cost import language_shape, tower_flops, tower_shape
from llava_uhd.images.cost_projectors import PROJECTOR_COSTS, Convention, HiwinCost
from llava_uhd.images.geometry import Size
from llava_uhd.images.tokens import view_token_counts
from llava_uhd.language.compressed import is_active
from llava_uhd.language.compressors import COMPRESSORS
from llava_uhd.language.runs import Run
from llava_uhd.train.counting import Facts

CONVENTION = (
    "Model FLOPs: matrix products only, a multiply-add is 2. A product with weights counts once "
    "forward, once more where its weights learn, and once more where what comes before it learns; "
    "the products inside attention have no weights and count three times wherever gradients pass. "
    "So a frozen tower counts one pass, a frozen language model behind a projector that learns two "
    "(so does one that learns through adapters, which count nothing themselves), a part that "
    "learns three, without the gradients of its inputs where nothing before it learns. Attention "
    "of the language model is causal (half of the square) and stays inside each sample; logits "
    "count at learned positions. Padding and what gradient checkpointing computes again do not "
    "count."
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


STACK = frozenset(UPSAMPLER_PARTS)


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
        self.learn = frozenset(learn)
        # Products of the language model with its weights.
        self.language_passes = 3 if "language_model" in self.learn and not adapters else 2

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
            tower, projector = self._tower(facts.grids), self._projector(facts.grids)
        linear, square = self._language(facts, compression)
        return PartFlops(tower, projector, self.language_passes * linear + 3 * square)

    def _tower(self, grids: Sequence[Size]) -> float:
        forward = float(tower_flops(self.config, grids))
        if "vision_tower" not in self.learn:
            return forward
        return 3 * forward - patch_flops(self.config, grids)

    def _projector(self, grids: Sequence[Size]) -> float:
        """The projector, and its upsampler by itself."""
        cost = PROJECTOR_COSTS.get(self.config.projector.type)
        forward = float(cost.flops(self.config, grids, Convention()))
        tower, before = "vision_tower" in self.learn, bool(STACK & self.learn)
        stack = total = 0.0
        if isinstance(cost, HiwinCost):
            stack = float(cost.upsampler_flops(self.config, grids))
            total = (1 + tower) * stack
            if "upsampler" in self.learn:
                total = 3 * stack
            elif before:
                total += fixup_flops(self.config, grids)
        if "projector" not in self.learn:
            return total + (2 if before or tower else 1) * (forward - stack)
        total += 3 * (forward - stack)
        return total if before or tower else total - feature_flops(self.config, grids)

    def forward(self, facts: Facts, compression: CompressionConfig | None = None) -> float:
        """Operations of a forward pass of the language model.

        Example: a body of 1000 weights in 2 layers, 1 head of width 8, a head of 5 x 8 weights;
        one sample of 10 tokens, 3 of them learned: 2 * 1000 * 10 + 2 * 2 * 8 * 10**2 + 2 * 40 * 3.
        """
        return sum(self._language(facts, compression))

    def _language(self, facts: Facts, compression: CompressionConfig | None) -> tuple[float, float]:
        """Products with weights, and those inside attention, of a forward pass."""
        shape = self.shape
        whole = shape.layers
        if compression is not None and is_active(compression, shape.layers):
            whole = max(compression.layer, 0)
        linear, square = (whole * each for each in self._layer(facts.lengths))
        if whole < shape.layers and compression is not None:
            rest = self._layer(shortened(facts, compression))
            linear += (shape.layers - whole) * rest[0]
            square += (shape.layers - whole) * rest[1]
        return linear + 2.0 * shape.vocabulary * shape.width * facts.learned, square

    def _layer(self, lengths: Collection[int]) -> tuple[float, float]:
        shape = self.shape
        linear = 2.0 * shape.body_weights / shape.layers * sum(lengths)
        square = 2.0 * shape.heads * shape.head_width * sum(length**2 for length in lengths)
        return linear, square


def patch_flops(config: LlavaUHDConfig, grids: Sequence[Size]) -> float:
    """Operations of the tower's patch embedding: nothing before it wants gradients.

    Example: 16 patches of 8 x 8 pixels, width 32: 2 * 16 * 192 * 32.
    """
    shape = tower_shape(config.vision_config)
    return 2.0 * sum(r * c for r, c in grids) * 3 * shape.patch_size**2 * shape.width


def fixup_flops(config: LlavaUHDConfig, grids: Sequence[Size]) -> float:
    """Operations of the 1x1 convolution behind the upsampler's last stage.

    Example: 16 patches doubled in both directions, 32 channels: 2 * 16 * 2**2 * 32**2.
    """
    largest, channels = max(config.projector.scales), config.vision_config.hidden_size
    return 2.0 * sum(r * c for r, c in grids) * largest**2 * channels**2


def feature_flops(config: LlavaUHDConfig, grids: Sequence[Size]) -> float:
    """Operations of a projector whose one operand is what the tower made, with weights before none.

    The multi-scale projector mixes weights and features in other orders: none of it is told apart.

    Example: a first linear layer from 32 to 64 channels on 16 patches: 2 * 16 * 32 * 64.
    """
    kind, width = config.projector.type, config.hidden_size
    channels = config.vision_config.hidden_size
    if kind == "spatial_resampler" and channels != width:
        return 2.0 * sum(r * c for r, c in grids) * channels * width
    if kind == "linear" or kind.endswith("x_gelu"):
        return 2.0 * sum(view_token_counts(config.projector, grids)) * channels * width
    return 0.0


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
