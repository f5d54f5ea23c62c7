"""The loss in pieces: the same numbers as all at once, for any head, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures_tiny import LLAMA, tiny_parts
from test_packed_model import COMPRESSIONS, build, samples_of
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llava_uhd.bench import loss as bench
from llava_uhd.bench.timing import peak_bytes
from llava_uhd.data.collator import Collator
from llava_uhd.errors import UserError
from llava_uhd.language.decoder import AS_THEY_ARE, IGNORE_INDEX, LogitRule, logit_rule
from llava_uhd.language.loss import (
    LEAST_CHUNKS,
    PIECE_BYTES,
    WHOLE_BYTES,
    LossPlan,
    plan_chunks,
    supervised_loss,
)
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.train.memory import logit_bytes

WIDTH, WORDS = 32, 300
PLANS = {
    "chunked": LossPlan("chunked"),
    "uneven": LossPlan("chunked", 7),
    "more pieces than tokens": LossPlan("auto", 64),
}
HEADS = ("plain", "bias", "frozen", "adapter", "modules_to_save", "4bit")


def make_head(kind: str) -> nn.Module:
    torch.manual_seed(1)
    head: nn.Module = nn.Linear(WIDTH, WORDS, bias=kind == "bias")
    if kind == "frozen":
        head.requires_grad_(False)
    if kind in ("adapter", "modules_to_save"):
        peft = pytest.importorskip("peft")
        options = {"target_modules": ["lm_head"], "lora_dropout": 0.1}
        if kind == "modules_to_save":
            options = {"target_modules": ["other"], "modules_to_save": ["lm_head"]}
        both = nn.ModuleDict({"lm_head": head, "other": nn.Linear(4, 4)})
        adapted = peft.get_peft_model(both, peft.LoraConfig(r=4, **options))
        head = adapted.base_model.model["lm_head"]
        for name, parameter in head.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    if kind == "4bit":
        quantised = pytest.importorskip("bitsandbytes").nn.Linear4bit(WIDTH, WORDS, bias=False)
        quantised.load_state_dict(head.state_dict())
        head = quantised.to("cpu").requires_grad_(False)
    return head


def make_batch(learned: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(3, 21, WIDTH, generator=generator)
    labels = torch.randint(WORDS, (3, 21), generator=generator)
    chosen = torch.randperm(60, generator=generator)[:learned]
    mask = torch.zeros(60, dtype=torch.bool)
    mask[chosen] = True
    labels[:, 1:] = labels[:, 1:].masked_fill(~mask.view(3, 20), IGNORE_INDEX)
    return hidden, labels


def learn(
    head: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], plan: LossPlan | None, **options: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of states and head; dropout draws alike."""
    hidden = batch[0].clone().requires_grad_()
    head.zero_grad()
    torch.manual_seed(3)
    loss = supervised_loss(head, hidden, batch[1], plan=plan, **options)
    loss.backward()
    found = {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}
    assert hidden.grad is not None
    return loss.detach(), {"hidden": hidden.grad, **found}


def assert_same(found: Any, expected: Any, loss: float = 1e-6, gradients: float = 1e-5) -> None:
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=loss, abs=1e-7)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = float(gradient.abs().max())
        assert float((found[1][name] - gradient).abs().max()) <= gradients * scale, name


# --- any head, any batch --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("plan", PLANS)
def test_pieces_are_the_whole(kind: str, plan: str) -> None:
    head, batch = make_head(kind), make_batch()
    if kind == "adapter":
        head.eval()  # each piece draws its own dropout: see below
    for items in (None, 123, torch.tensor(77)):
        expected = learn(head, batch, None, num_items=items)
        assert float(expected[1]["hidden"].abs().max()) > 0
        assert_same(learn(head, batch, PLANS[plan], num_items=items), expected)
    assert (kind in ("frozen", "4bit")) == (len(expected[1]) == 1)


def test_dropout_of_a_piece_is_drawn_once() -> None:
    """The pass that computes logits again sees the numbers of the first: gradients fit the loss."""
    head, (hidden, labels) = make_head("adapter").train(), make_batch()
    hidden = hidden.double().requires_grad_()
    head = head.double()

    def value(states: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(4)
        return supervised_loss(head, states, labels, plan=LossPlan("chunked")).double()

    (gradient,) = torch.autograd.grad(value(hidden), hidden)
    step = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5)).double()
    with torch.no_grad():
        slope = (value(hidden + 1e-2 * step) - value(hidden - 1e-2 * step)) / 2e-2
    assert float(slope) == pytest.approx(float((gradient * step).sum()), rel=2e-3)


@pytest.mark.parametrize("learned", [0, 1, 3])
def test_few_tokens(learned: int) -> None:
    """Every plan calls the head as often as it says, also where there is less to do."""
    head, batch = make_head("plain"), make_batch(learned)
    expected = learn(head, batch, None)
    calls: list[int] = []
    head.register_forward_hook(lambda *_: calls.append(1))
    found = learn(head, batch, LossPlan("chunked", 5))
    assert len(calls) == 10  # forward, and again in the backward pass
    assert found[1]["hidden"].isfinite().all()
    if learned:
        assert_same(found, expected)
    else:
        assert float(found[0]) == 0 and not any(g.any() for g in found[1].values())
    with torch.no_grad():
        loss = supervised_loss(head, *batch, plan=LossPlan("chunked", 5))
    assert len(calls) == 15
    assert float(loss) == pytest.approx(float(expected[0]), abs=1e-6)


def test_half_precision() -> None:
    """Under autocast pieces are about as far from float32 as all at once."""
    head, batch = make_head("plain"), make_batch(60)
    exact = learn(head, batch, None)

    def error(plan: LossPlan | None) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss, gradients = learn(head, batch, plan)
        assert float(loss) == pytest.approx(float(exact[0]), rel=2e-3)
        return max(
            float((gradients[name] - value).norm() / value.norm())
            for name, value in exact[1].items()
        )

    whole, pieces = error(None), error(LossPlan("chunked", 8))
    assert 0 < whole < 0.01 and pieces < 2 * whole


# --- the model ------------------------------------------------------------------------------------


def model_gradients(
    model: LlavaUHDForConditionalGeneration, inputs: dict[str, Any], plan: LossPlan | None
) -> Any:
    model.zero_grad()
    loss = model(**inputs, loss_plan=plan, num_items_in_batch=50).loss
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {"all": torch.cat([g.flatten().clone() for g in named.values()])}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_samples(compression: str, packed: bool) -> None:
    """Padded and packed, with images, videos and texts, their labels moved by compression."""
    model, processor = build("onevision")
    collate = Collator(processor.tokenizer.pad_token_id or 0, packed)
    inputs = {**collate(samples_of("onevision")), "compression": COMPRESSIONS[compression]}
    expected = model_gradients(model, inputs, None)
    assert_same(model_gradients(model, inputs, LossPlan("chunked")), expected)
    texts = {**collate(samples_of("onevision")[:1]), "compression": COMPRESSIONS[compression]}
    expected = model_gradients(model, texts, None)
    assert_same(model_gradients(model, texts, LossPlan("chunked")), expected)


def test_tied_head() -> None:
    model, _ = tiny_parts({**LLAMA, "tie_word_embeddings": True})
    ids = torch.arange(3, 43).view(2, 20)
    inputs = {"input_ids": ids, "labels": ids}
    expected = model_gradients(model.train(), inputs, None)
    assert_same(model_gradients(model, inputs, LossPlan("chunked")), expected)


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
SCALED: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "llama": {},
}


@pytest.mark.parametrize("kind", SCALED)
def test_what_models_do_behind_their_head(kind: str) -> None:
    """Loss and logits are those of the library's own model."""
    config = CONFIG_MAPPING[kind](**SMALL, **SCALED[kind])
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    text = {"model_type": kind, **SMALL, **SCALED[kind]}
    ours, _ = tiny_parts(text, attn_implementation="eager")
    ours.language_model.load_state_dict(theirs.state_dict())
    ids = torch.arange(3, 23)[None]
    expected = theirs(input_ids=ids, labels=ids)
    found = ours(input_ids=ids, labels=ids, logits_to_keep=0)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)
    if kind != "llama":
        with torch.no_grad():
            plain = ours.get_output_embeddings()(ours.get_decoder()(ids).last_hidden_state)
        assert float((plain - expected.logits).abs().max()) > 0.01
    pieces = ours(input_ids=ids, labels=ids, loss_plan=LossPlan("chunked"))
    torch.testing.assert_close(pieces.loss, expected.loss)


def test_unknown_factors_are_refused() -> None:
    config = CONFIG_MAPPING["llama"](**SMALL)
    config.logit_scale = 1.0
    assert logit_rule(config) == LogitRule(64)
    config.logit_scale = 0.5
    with pytest.raises(UserError, match=r"'llama' has logit_scale 0\.5.*would be wrong"):
        logit_rule(config)
    assert AS_THEY_ARE.vocabulary == 0


# --- how many pieces, how much memory -------------------------------------------------------------


def test_number_of_pieces() -> None:
    words = 151936
    most = WHOLE_BYTES // (4 * words)
    assert plan_chunks("auto", most, words) == 1 == plan_chunks("whole", 10**6, words)
    assert plan_chunks("auto", most + 1, words) == plan_chunks("chunked", most + 1, words) == 5
    assert plan_chunks("chunked", 1, 10) == LEAST_CHUNKS
    for rows in (3_000, 30_000):
        pieces = plan_chunks("chunked", rows, words)
        assert rows / pieces * words * 4 <= PIECE_BYTES < rows / (pieces - 1) * words * 4
    assert LossPlan("whole", 3).pieces(10, 10) == 3


@pytest.mark.parametrize("frozen", [False, True])
def test_memory(frozen: bool) -> None:
    """Tensors alive at the peak: a fraction in pieces, and within 15 % of the estimate."""
    task = bench.Task(1024, 6000, 64, frozen)
    peaks = {}
    for form in ("whole", "chunked"):
        variant = bench.make(task, form)
        peaks[form] = peak_bytes(variant, torch.device("cpu"))
        states = 2 * task.rows * task.hidden * 4  # learned rows, gradient
        assert peaks[form] == pytest.approx(task.estimate(form) + states, rel=0.15)
    assert peaks["chunked"] < 0.35 * peaks["whole"]
    shape = (2048, 150000, 4096, 2)
    assert logit_bytes(*shape, "auto", True) == logit_bytes(*shape, "whole", True)
    assert logit_bytes(*shape, "liger", False) < logit_bytes(*shape, "chunked", False)
