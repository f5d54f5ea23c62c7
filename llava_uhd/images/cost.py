"""What an image costs: parameters and operations of a model, from its shapes alone.

One multiply-add counts as two operations (FLOP = 2 MAC). Matrix products are counted; norms,
activations, softmax and resampling are not. `Convention` says what else differs between what is
computed here and what published tables count. Projectors: `cost_projectors`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedConfig

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.images.cost_projectors import PROJECTOR_COSTS
from llava_uhd.images.cost_projectors import Convention as Convention
from llava_uhd.images.geometry import Size, SlicePlan, num_schema_tokens
from llava_uhd.images.maps import image_maps
from llava_uhd.images.tokens import view_token_shapes

# The one of the compute table of LLaVA-UHD (arXiv 2403.11703).
PUBLISHED = Convention(causal=False, all_logits=True, whole_tower=True, published_projector=True)


@dataclass(frozen=True)
class Cost:
    """Operations of one image with its text.

    Attributes:
        tower: vision tower, all views.
        projector: all views.
        language: prefill of all positions.
        visual_tokens: tokens that the projector makes.
        positions: sequence length: visual tokens, separators and text.
    """

    tower: float
    projector: float
    language: float
    visual_tokens: int
    positions: int

    @property
    def total(self) -> float:
        """Sum of the three parts."""
        return self.tower + self.projector + self.language


@dataclass(frozen=True)
class TowerShape:
    """Shape of a vision transformer; widths in channels."""

    width: int
    mlp_width: int
    layers: int
    patch_size: int
    image_size: int
    class_token: bool
    patch_bias: bool
    num_norms: int

    def parameters(self, layers: int | None = None, num_norms: int | None = None) -> int:
        """Parameters of the whole tower, or of its first ``layers`` with ``num_norms`` norms."""
        d, ff = self.width, self.mlp_width
        layer = 4 * (d * d + d) + 2 * d * ff + ff + d + 4 * d
        patch = 3 * self.patch_size**2 * d + (d if self.patch_bias else 0)
        side = self.image_size // self.patch_size
        positions = (side * side + self.class_token) * d + self.class_token * d
        norms = self.num_norms if num_norms is None else num_norms
        return (
            patch + positions + (self.layers if layers is None else layers) * layer + 2 * d * norms
        )

    def flops(self, patches: int, layers: int) -> int:
        """Operations of one view of ``patches`` patches through ``layers`` layers."""
        d, tokens = self.width, patches + self.class_token
        linear = 2 * tokens * (4 * d * d + 2 * d * self.mlp_width)
        core = 4 * tokens**2 * d
        return layers * (linear + core) + 2 * patches * 3 * self.patch_size**2 * d


# model_type -> (class token, bias of the patch embedding, norms outside the layers)
TOWER_KINDS = {"clip_vision_model": (True, False, 2), "siglip_vision_model": (False, True, 1)}


def tower_shape(config: PreTrainedConfig) -> TowerShape:
    """Shape of a transformers vision configuration.

    Raises:
        UserError: a family whose cost is not known.
    """
    if config.model_type not in TOWER_KINDS:
        known = ", ".join(sorted(TOWER_KINDS))
        raise UserError(f"no cost formula for vision tower '{config.model_type}' (known: {known})")
    return TowerShape(
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.patch_size,
        config.image_size,
        *TOWER_KINDS[config.model_type],
    )


@dataclass(frozen=True)
class LanguageShape:
    """Shape of a decoder of Llama's kind (gated MLP, grouped queries)."""

    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    tied: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def body_weights(self) -> int:
        """Weights of all matrix products except the head; each costs 2 operations per token."""
        inner, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        attention = self.width * (2 * inner + 2 * kv)
        return self.layers * (attention + 3 * self.width * self.mlp_width)

    @property
    def parameters(self) -> int:
        """All parameters, embeddings and head included."""
        inner, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        extra = 2 * self.width
        extra += (inner + 2 * kv) * self.qkv_bias + self.width * self.out_bias
        extra += (2 * self.mlp_width + self.width) * self.mlp_bias
        extra += 2 * self.head_width * self.qk_norm
        tables = (1 if self.tied else 2) * self.vocabulary * self.width
        return self.body_weights + self.layers * extra + tables + self.width

    def flops(self, tokens: int, convention: Convention) -> float:
        """Operations of a prefill of ``tokens`` positions."""
        core = 4 * self.layers * self.heads * self.head_width * tokens**2
        logits = 2 * self.vocabulary * self.width * (tokens if convention.all_logits else 1)
        return 2 * self.body_weights * tokens + core * (0.5 if convention.causal else 1) + logits


LANGUAGE_KINDS = ("llama", "mistral", "qwen2", "qwen3")


def language_shape(config: PreTrainedConfig) -> LanguageShape:
    """Shape of a transformers text configuration.

    Raises:
        UserError: a family whose cost is not known (a mixture of experts, for instance).
    """
    kind = config.model_type
    if kind not in LANGUAGE_KINDS:
        known = ", ".join(LANGUAGE_KINDS)
        raise UserError(f"no cost formula for language model '{kind}' (known: {known})")
    heads = config.num_attention_heads
    bias = bool(getattr(config, "attention_bias", False))
    return LanguageShape(
        width=config.hidden_size,
        mlp_width=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=kind == "qwen3",
    )


def built_tower_layers(config: LlavaUHDConfig) -> int:
    """Layers up to the selected hidden state."""
    layers, selected = config.vision_config.num_hidden_layers, config.select_layer
    return selected if selected >= 0 else layers + 1 + selected


def tower_flops(
    config: LlavaUHDConfig, grids: Iterable[Size], convention: Convention | None = None
) -> int:
    """Operations of the vision tower for views with these patch grids (rows, columns)."""
    shape = tower_shape(config.vision_config)
    whole = convention is not None and convention.whole_tower
    layers = shape.layers if whole else built_tower_layers(config)
    return sum(shape.flops(rows * columns, layers) for rows, columns in grids)


def image_cost(
    config: LlavaUHDConfig,
    plan: SlicePlan,
    text_tokens: int = 0,
    convention: Convention | None = None,
    *,
    separators: bool = True,
) -> Cost:
    """Operations of reading one image and its text.

    Example: LLaVA-1.5-13B at 336x336 under `PUBLISHED`: 15.495e12 in all.

    Args:
        config: of the model.
        plan: views of the image.
        text_tokens: tokens beside those of the image.
        convention: what is counted; None for what this package computes.
        separators: count the positions of the separators between slices.

    Raises:
        UserError: a tower, projector or language model without formula.
    """
    convention = convention or Convention()
    grids = plan.view_grids
    shapes = view_token_shapes(config.projector, grids)
    visual = sum(each.tokens for each in image_maps(config.image, plan, shapes))
    per_view = shapes[0][0] * shapes[0][1]
    schema = num_schema_tokens(plan, config.image.layout, per_view) if separators else 0
    positions = visual + text_tokens + schema
    return Cost(
        tower=tower_flops(config, grids, convention),
        projector=PROJECTOR_COSTS.get(config.projector.type).flops(config, grids, convention),
        language=language_shape(config.text_config).flops(positions, convention),
        visual_tokens=visual,
        positions=positions,
    )


@dataclass(frozen=True)
class Parameters:
    """Parameters of the parts.

    Attributes:
        tower: of the whole published tower.
        built_tower: of the part that is built, up to the selected layer.
        projector: all.
        language: embeddings and head included.
    """

    tower: int
    built_tower: int
    projector: int
    language: int

    @property
    def total(self) -> int:
        """Of the model as built."""
        return self.built_tower + self.projector + self.language


def count_parameters(config: LlavaUHDConfig) -> Parameters:
    """Parameters of a model, from its shapes.

    Raises:
        UserError: a tower, projector or language model without formula.
    """
    shape = tower_shape(config.vision_config)
    built = shape.parameters(built_tower_layers(config), int(shape.class_token))
    return Parameters(
        tower=shape.parameters(),
        built_tower=built,
        projector=PROJECTOR_COSTS.get(config.projector.type).parameters(config),
        language=language_shape(config.text_config).parameters,
    )
