"""Operations of a training pass against a count of every product that torch really makes."""

from __future__ import annotations

from typing import Any

import pytest
from fixtures_tiny import picture, tiny_parts
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_uhd.config.lora import LoraSection
from llava_uhd.config.training import StageConfig
from llava_uhd.train.counting import Facts, facts_of
from llava_uhd.train.flops import PartFlops, TrainingFlops
from llava_uhd.train.lora import add_adapters
from llava_uhd.train.stages import apply_stage

KINDS: dict[str, dict[str, Any]] = {
    "mlp": {"projector": {"type": "mlp2x_gelu"}, "image": {"strategy": "pad", "layout": "flat"}},
    "resampler": {},
    "hiwin": {"projector": {"type": "hiwin", "scales": [1, 2]}},
}
STAGES = {
    "projector": ("projector",),
    "projector_and_language": ("projector", "language_model"),
    "language": ("language_model",),
    "all": ("vision_tower", "projector", "language_model"),
}


def counted(
    kind: str, learn: tuple[str, ...], rank: int | None = None, checkpointing: bool = False
) -> tuple[PartFlops, Facts, Any]:
    """A real pass forward and back, counted product by product; what it held, and the config."""
    model, processor = tiny_parts(**KINDS[kind])
    config = model.config
    if rank is not None:
        add_adapters(model, LoraSection(r=rank, dropout=0.0))
    model.train()
    apply_stage(model, StageConfig(learn=dict.fromkeys(learn)))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    text = "USER: <image>\nWhat is it in all of these words? ASSISTANT: red and blue"
    batch = dict(processor(text=text, images=[picture(64, 32)]))
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :-6] = -100
    # The counter does not know the fused attention of a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    found = {name: float(sum(each.values())) for name, each in counter.get_flop_counts().items()}
    root = type(model).__name__
    tower, projector = found[f"{root}.vision_tower"], found[f"{root}.projector"]
    parts = PartFlops(tower, projector, found["Global"] - tower - projector)
    return parts, facts_of(batch, config), config


def upper_half(facts: Facts, config: Any) -> float:
    """What attention computes above the diagonal, three times: the convention leaves it out."""
    text = config.text_config
    width = text.hidden_size
    square = sum(length**2 for length in facts.lengths)
    return 3.0 * 2 * text.num_hidden_layers * width * square


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_pass_counts_what_torch_computes(kind: str, stage: str) -> None:
    learn = STAGES[stage]
    real, facts, config = counted(kind, learn)
    ours = TrainingFlops(config, learn)(facts)
    assert ours.tower == real.tower
    assert ours.language + upper_half(facts, config) == real.language
    if kind == "mlp":
        assert ours.projector == real.projector
    else:
        # Products with constants and with tables that rest are not told apart.
        most = 0.08 if kind == "resampler" else 0.12
        assert ours.projector == pytest.approx(real.projector, rel=most)


def test_what_rests_before_the_first_part_that_learns_has_no_backward_pass() -> None:
    passes = {}
    for stage in ("projector", "language"):
        real, facts, config = counted("mlp", STAGES[stage])
        passes[stage] = TrainingFlops(config, STAGES[stage])(facts)
        assert passes[stage].tower == real.tower
    tokens, width, channels = 16, 64, 32
    first, second = 2 * tokens * channels * width, 2 * tokens * width * width
    assert passes["language"].projector == first + second
    assert passes["projector"].projector == 2 * first + 3 * second


@pytest.mark.parametrize("learn", [("projector", "language_model"), ("language_model",)])
def test_adapters_cost_themselves_and_no_gradients_of_frozen_weights(
    learn: tuple[str, ...],
) -> None:
    rank = 4
    real, facts, config = counted("mlp", learn, rank)
    ours = TrainingFlops(config, learn, adapters=True)(facts)
    widths = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]
    own = 3 * 2 * facts.tokens * 2 * sum(rank * (inside + out) for inside, out in widths)
    extra = real.language - ours.language - upper_half(facts, config)
    if "projector" in learn:
        assert extra == own
    else:  # the first layer's queries, keys, values get the same inputs in each step
        unneeded = 2 * facts.tokens * (64 * (64 + 32 + 32) + 3 * 64 * rank)
        assert extra == own - unneeded


@pytest.mark.parametrize("stage", ["projector", "all"])
def test_what_checkpointing_computes_again_is_not_useful(stage: str) -> None:
    learn = STAGES[stage]
    plain, facts, config = counted("mlp", learn)
    again, _, _ = counted("mlp", learn, checkpointing=True)
    ours = TrainingFlops(config, learn)(facts)
    assert again.total > 1.15 * plain.total
    assert ours.total + upper_half(facts, config) == plain.total


def test_an_upsampler_at_rest_counts_one_pass_and_its_last_convolution_by_itself() -> None:
    config = tiny_parts(**KINDS["hiwin"])[0].config
    facts = Facts((20,), 20, 4, 5, ((4, 4),))
    rest = TrainingFlops(config, ("projector",))(facts).projector
    fixup = TrainingFlops(config, ("projector", "upsampler_fixup"))(facts).projector
    whole = TrainingFlops(config, ("projector", "upsampler"))(facts).projector
    assert fixup - rest == 2 * 16 * 2**2 * 32**2
    assert rest < fixup < whole
    learn = ("projector", "upsampler", "language_model")
    real, found, config = counted("hiwin", learn)
    ours = TrainingFlops(config, learn)(found)
    assert ours.projector == pytest.approx(real.projector, rel=0.05)
