"""Parameters and operations of projectors, from their shapes.

As in `cost`: matrix products count, one multiply-add as two operations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.images.geometry import Size, pool_bins
from llava_uhd.images.tokens import MLP_DEPTHS, view_token_counts
from llava_uhd.registry import Registry


@dataclass(frozen=True)
class Convention:
    """What a count includes. The defaults are what this package computes for an answer.

    Attributes:
        causal: attention of the language model costs half of the full square.
        all_logits: logits at every position instead of one.
        whole_tower: all layers of the tower, also those behind the selected one.
        published_projector: the projector as first published instead of the equal, cheaper form.
        attention_inputs: count the input projections of the projector's attention. Profilers that
            hook modules do not see them inside ``nn.MultiheadAttention``.
    """

    causal: bool = True
    all_logits: bool = False
    whole_tower: bool = False
    published_projector: bool = False
    attention_inputs: bool = True


class ProjectorCost(Protocol):
    """Formulas of one projector."""

    def parameters(self, config: LlavaUHDConfig) -> int:
        """Parameters of the module."""

    def flops(self, config: LlavaUHDConfig, grids: Sequence[Size], convention: Convention) -> int:
        """Operations for views with these patch grids (rows, columns), in one call."""


PROJECTOR_COSTS: Registry[ProjectorCost] = Registry("projector")


class ResamplerCost:
    """The spatially constrained resampler; Q queries, H heads, width D, k bins per window."""

    def parameters(self, config: LlavaUHDConfig) -> int:
        """Parameters of the module, the position table included."""
        d, c = config.hidden_size, config.vision_config.hidden_size
        tables = 2 * config.projector.num_queries * d
        return (c * d if c != d else 0) + 4 * (d * d + d) + tables + 3 * 2 * d + d * d

    def flops(self, config: LlavaUHDConfig, grids: Sequence[Size], convention: Convention) -> int:
        """Operations, in the published form or as computed here."""
        d, c = config.hidden_size, config.vision_config.hidden_size
        queries = config.projector.num_queries
        heads = config.projector.num_heads or max(d // 128, 1)
        square = 2 * queries * d * d
        total = sum(2 * rows * columns * c * d for rows, columns in grids) if c != d else 0
        total += 2 * len(grids) * square  # output projection of the attention, last projection
        if convention.published_projector:
            for grid in grids:
                bins = _num_bins(grid)
                total += 4 * queries * bins * d  # scores and averages
                if convention.attention_inputs:
                    total += square + 2 * bins * square  # queries, keys and values
            return total
        if convention.attention_inputs:
            # Queries in and through the keys' matrix once; averaged values once per view.
            total += 2 * square + len(grids) * square
        for grid, count in Counter(grids).items():
            core = 2 * queries * _num_bins(grid) * d * heads
            pooling = _pooling(grid, queries, d)
            total += (count + 1) * (core + pooling) + count * core  # scores, positions, averages
        return total


def _pooling(grid: Size, queries: int, width: int, table: int | None = None) -> int:
    """Pooling of a map, or of a square table of that side which is resampled on the way."""
    bin_rows, bin_columns = pool_bins(*grid)
    rows, columns = (table, table) if table else grid
    side = round(queries**0.5)
    down, across = side * bin_rows, side * bin_columns
    return 2 * down * rows * columns * width + 2 * down * across * columns * width


def _num_bins(grid: Size) -> int:
    rows, columns = pool_bins(*grid)
    return rows * columns


class HiwinCost:
    """The multi-scale projector with its upsampler; four query sets, S scales.

    The upsampler is counted as an upsampler of that kind needs it, whatever the form: its 7x7
    convolution as 49 multiply-adds per value.
    """

    sets = 4
    taps = 49
    key_width = 32
    extra = 8  # columns beside a pooled cell, see `llava_uhd.projectors.hiwin_fast`

    def parameters(self, config: LlavaUHDConfig) -> int:
        """Parameters of the module, position table and upsampler included."""
        d, c = config.hidden_size, config.vision_config.hidden_size
        options = config.projector
        tables = (1 + self.sets) * options.num_queries * d
        scales = len(options.scales) * (c * d + d + d)
        joined = self.sets * d * d + d
        own = tables + scales + 4 * (d * d + d) + 4 * 2 * d + joined + d * d
        return own + self._stack_parameters(max(options.scales), c)

    def _stack_parameters(self, scale: int, width: int) -> int:
        if scale == 1:
            return 0
        key, taps = self.key_width, self.taps
        stage = 2 + (3 * key + key) + (key * key + key) + ((taps + 3) * taps + taps)
        stage += taps * taps + taps
        stages = scale.bit_length() - 1
        fixups = 1 if scale < 8 else 1 + stages
        return stages * stage + fixups * (width * width + width)

    def flops(self, config: LlavaUHDConfig, grids: Sequence[Size], convention: Convention) -> int:
        """Operations, in the published form or as computed here."""
        own = self._published if convention.published_projector else self._fast
        return own(config, grids, convention) + self.upsampler_flops(config, grids)

    def upsampler_flops(self, config: LlavaUHDConfig, grids: Sequence[Size]) -> int:
        """Operations of the upsampler alone."""
        c, scales = config.vision_config.hidden_size, config.projector.scales
        key, taps = self.key_width, self.taps
        networks = 3 * key + key * key + taps * key + (taps + 3) * taps + taps * taps
        total, largest = 0, max(scales)
        for scale in (2, 4, 8):
            if scale <= largest:
                corrected = scale == largest or largest == 8
                each = networks + taps * c + (c * c if corrected else 0)
                total += 2 * scale**2 * sum(rows * columns for rows, columns in grids) * each
        return total

    def _published(
        self, config: LlavaUHDConfig, grids: Sequence[Size], convention: Convention
    ) -> int:
        d, c = config.hidden_size, config.vision_config.hidden_size
        scales, queries = config.projector.scales, config.projector.num_queries
        square = 2 * queries * d * d
        cells = sum(rows * columns for rows, columns in grids) * sum(s**2 for s in scales)
        total = 2 * cells * c * d
        # Output projections of the attention, the joined product, the last projection.
        total += len(grids) * (2 * self.sets + 1) * square
        for grid in grids:
            tokens = len(scales) * _num_bins(grid)
            total += self.sets * 4 * queries * tokens * d  # scores and averages
            if convention.attention_inputs:
                total += self.sets * (1 + 2 * tokens) * square
        return total

    def _fast(self, config: LlavaUHDConfig, grids: Sequence[Size], convention: Convention) -> int:
        d, c = config.hidden_size, config.vision_config.hidden_size
        options = config.projector
        queries, scales = options.num_queries, options.scales
        heads = options.num_heads or max(d // 128, 1)
        wide, square = c + self.extra, 2 * queries * d * d
        cells = sum(rows * columns for rows, columns in grids)
        total = (self.sets + 1) * square if convention.attention_inputs else 0  # queries, positions
        total += len(grids) * (2 * self.sets + 1) * square
        for scale in scales:
            through_gram = 2 * scale**2 * cells * c * c + 2 * c * c * d
            total += min(through_gram, 2 * scale**2 * cells * c * d)  # deviations
            total += 2 * 2 * d * d * wide + 2 * d * d  # merged matrices, the scale's embedding
        for grid, count in Counter(grids).items():
            core = 2 * queries * self.sets * heads * _num_bins(grid) * wide
            project = 2 * queries * self.sets * d * wide
            place = 2 * queries * self.sets * d * _num_bins(grid)
            total += len(scales) * (count * (2 * core + project) + project + place)
            for scale in scales:
                size = (scale * grid[0], scale * grid[1])
                total += count * _pooling(size, queries, c)
                total += _pooling(size, queries, d, round(queries**0.5))
        return total


@dataclass(frozen=True)
class MLPCost:
    """Linear layers on each patch, or on each square of patches.

    Attributes:
        depth: linear layers.
        unshuffled: whether squares of ``projector.unshuffle`` patches are joined and normalised.
    """

    depth: int
    unshuffled: bool = False

    def parameters(self, config: LlavaUHDConfig) -> int:
        """Parameters of the module."""
        d, c = config.hidden_size, self._width(config)
        norm = 2 * c if self.unshuffled else 0
        return norm + c * d + d + (self.depth - 1) * (d * d + d)

    def flops(self, config: LlavaUHDConfig, grids: Sequence[Size], convention: Convention) -> int:
        """Operations."""
        d, c = config.hidden_size, self._width(config)
        tokens = sum(view_token_counts(config.projector, grids))
        return 2 * tokens * (c * d + (self.depth - 1) * d * d)

    def _width(self, config: LlavaUHDConfig) -> int:
        side = config.projector.unshuffle if self.unshuffled else 1
        return int(config.vision_config.hidden_size) * side**2


class IdentityCost:
    """Nothing at all."""

    def parameters(self, config: LlavaUHDConfig) -> int:
        """None."""
        return 0

    def flops(self, config: LlavaUHDConfig, grids: Sequence[Size], convention: Convention) -> int:
        """None."""
        return 0


PROJECTOR_COSTS.add("hiwin", HiwinCost())
PROJECTOR_COSTS.add("identity", IdentityCost())
PROJECTOR_COSTS.add("linear", MLPCost(1))
PROJECTOR_COSTS.add("pixel_unshuffle_mlp", MLPCost(2, unshuffled=True))
PROJECTOR_COSTS.add("spatial_resampler", ResamplerCost())
for _depth in MLP_DEPTHS:
    PROJECTOR_COSTS.add(f"mlp{_depth}x_gelu", MLPCost(_depth))
