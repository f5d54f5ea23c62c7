"""Training passes over the same samples: padded in two orders, and packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_uhd.bench.pack_data import IMAGE_TOKENS, LONGEST, Lengths, text_lengths
from llava_uhd.bench.pack_plans import (
    GROUPED,
    PACKED,
    SHUFFLED,
    Sharing,
    grouped_order,
    packed_way,
    shuffled_order,
)
from llava_uhd.bench.timing import Variant
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.config.training import DataConfig
from llava_uhd.data.collator import Collator
from llava_uhd.data.costs import TrainingCost
from llava_uhd.data.dataset import build_dataset
from llava_uhd.data.demo_tokenizer import build_demo_tokenizer
from llava_uhd.data.synthetic import SyntheticConfig, generate
from llava_uhd.language.by_sample import BY_SAMPLE
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.encoding import IGNORE_INDEX
from llava_uhd.text.processor import LlavaUHDProcessor

PATCH, VIEW = 8, 64
# An image of the small model has 64 tokens: lengths of the simulated data are divided by this.
SCALE = IMAGE_TOKENS // (VIEW // PATCH) ** 2
# Assumed: so much of a text is answers.
ANSWERS = 0.6

# Packed rows whose attention is one square with a mask.
MASKED = "packed, one mask"

Sample = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A small random model.

    Attributes:
        layers: decoder layers.
        hidden: width of the decoder, a multiple of 64.
        dtype: of its weights.
        device: where.
    """

    layers: int = 3
    hidden: int = 256
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def parts(self, **options: Any) -> tuple[LlavaUHDForConditionalGeneration, LlavaUHDProcessor]:
        """The model, whose tower rests, and its processor.

        Args:
            **options: of `LlavaUHDConfig`.
        """
        tokenizer = build_demo_tokenizer()
        config = LlavaUHDConfig(
            vision_config={
                "model_type": "clip_vision_model",
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": VIEW,
                "patch_size": PATCH,
            },
            text_config={
                "model_type": "llama",
                "hidden_size": self.hidden,
                "intermediate_size": self.hidden * 8 // 3 // 32 * 32,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.hidden // 64,
                "num_key_value_heads": self.hidden // 64,
                "max_position_embeddings": 4096,
                "vocab_size": len(tokenizer),
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
            **options,
        )
        processor = LlavaUHDProcessor.from_parts(tokenizer, config)
        torch.manual_seed(0)
        model = LlavaUHDForConditionalGeneration(config).to(self.device, self.dtype)
        model.vision_tower.requires_grad_(False)
        return model.train(), processor


def simulated_samples(
    processor: LlavaUHDProcessor, count: int, seed: int = 0
) -> tuple[list[Sample], list[int]]:
    """Samples with the simulated lengths divided by `SCALE`, and their signed text lengths.

    Args:
        processor: of the model; an image has 64 tokens.
        count: samples.
        seed: of lengths and contents.
    """
    text, pictured = text_lengths(count, seed)
    generator = torch.Generator().manual_seed(seed)
    placeholder = processor.image_token_id or 0
    ordinary = 10  # ids from here on are plain pieces of text
    samples, words = [], []
    for length, image in zip(text.tolist(), pictured.tolist(), strict=True):
        visual = IMAGE_TOKENS // SCALE if image else 0
        tokens = max(min(round(length / SCALE), LONGEST // SCALE - visual), 3)
        ids = torch.randint(ordinary, 40, (visual + tokens,), generator=generator)
        ids[1 : 1 + visual] = placeholder
        labels = ids.clone()
        labels[: -max(round(tokens * ANSWERS), 1)] = IGNORE_INDEX
        sample: Sample = {"input_ids": ids, "labels": labels}
        if image:
            side = VIEW // PATCH
            sample["pixel_values"] = torch.randn(side**2, 3 * PATCH**2, generator=generator)
            sample["view_grids"] = torch.tensor([[side, side]])
        samples.append(sample)
        words.append(tokens if image else -tokens)
    return samples, words


def embedded_samples(
    processor: LlavaUHDProcessor, count: int, folder: Path
) -> tuple[list[Sample], list[int]]:
    """Samples of the embedded mixture (an image, two, a video, none, in turn), and signed words.

    Args:
        processor: of the model.
        count: samples.
        folder: to draw them into.
    """
    generate(folder, SyntheticConfig(tiles=1, train=count, eval=1, mixed=True))
    file, images, videos = (str(folder / each) for each in ("finetune.json", "images", "videos"))
    dataset = build_dataset(DataConfig(file, images, videos), processor)
    samples = [dataset[index] for index in range(count)]
    return [each for each in samples if isinstance(each, dict)], dataset.modality_lengths


def lengths_of(
    title: str, samples: Sequence[Sample], words: Sequence[int], config: LlavaUHDConfig
) -> Lengths:
    """What the plans of samples are made from; the small tower counts as nothing."""
    tokens = np.array([len(each["input_ids"]) for each in samples], np.int64)
    cost = TrainingCost.of(config.text_config, ["projector", "language_model"])
    return Lengths(title, tokens, np.zeros(len(tokens)), words, cost)


def make_batches(
    samples: Sequence[Sample], lengths: Lengths, sharing: Sharing, seed: int = 0
) -> dict[str, list[dict[str, torch.Tensor]]]:
    """The batches of each way over the same samples."""
    found = {}
    for name, make in ((SHUFFLED, shuffled_order), (GROUPED, grouped_order)):
        order, size = make(lengths, sharing, seed), sharing.per_device
        found[name] = [
            Collator(0)([samples[index] for index in order[start : start + size]])
            for start in range(0, len(order), size)
        ]
    plan = packed_way(lengths, sharing, seed)[1].plan(0)
    collate = Collator(0, packed=True)
    found[PACKED] = [collate([samples[index] for index in row]) for row in plan.rows() if row]
    return found


def learned(batches: Sequence[Mapping[str, torch.Tensor]]) -> int:
    """Learned tokens."""
    return sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)


def make_variant(
    model: LlavaUHDForConditionalGeneration,
    batches: Sequence[Mapping[str, torch.Tensor]],
    backend: str = "sdpa",
) -> Variant:
    """Forward and backward over all batches; the result is the gradient of the mean loss.

    Args:
        model: in training.
        batches: of all samples.
        backend: of the language model's attention.
    """
    device, dtype = model.device, model.dtype
    placed = [
        {
            name: values.to(device, dtype if values.is_floating_point() else None)
            for name, values in batch.items()
        }
        for batch in batches
    ]
    total = learned(batches)

    decoder: Any = model.get_decoder()

    def run() -> list[torch.Tensor]:
        decoder.config._attn_implementation = backend
        model.zero_grad()
        for batch in placed:
            model(**batch, num_items_in_batch=total).loss.backward()
        return [each.grad.detach().clone() for each in model.parameters() if each.grad is not None]

    return Variant(run, _joined)


def _joined(gradients: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([each.flatten().cpu() for each in gradients])


MODELS: dict[str, dict[str, Any]] = {
    # LLaVA-1.5, one view of each image.
    "simulated": {
        "projector": {"type": "mlp2x_gelu"},
        "image": {
            "strategy": "pad",
            "layout": "flat",
            "scale_resolution": VIEW,
            "patch_size": PATCH,
        },
    },
    # LLaVA-UHD, slices of 16 tokens.
    "embedded": {
        "projector": {"num_queries": 16, "num_heads": 4},
        "image": {"scale_resolution": VIEW, "patch_size": PATCH},
    },
}


@dataclass(frozen=True)
class Passes:
    """What is measured on one set of samples.

    Attributes:
        lengths: of the samples.
        learned: learned tokens of all of them.
        batches: number of batches of each way.
        variants: passes of each way.
    """

    lengths: Lengths
    learned: int
    batches: dict[str, int]
    variants: dict[str, Variant]


def prepare(kind: str, task: Task, count: int, sharing: Sharing, folder: Path) -> Passes:
    """Builds model, samples and batches.

    Args:
        kind: key of `MODELS`.
        task: the model.
        count: samples.
        sharing: of the samples; one device.
        folder: for embedded data.
    """
    model, processor = task.parts(**MODELS[kind])
    if kind == "embedded":
        samples, words = embedded_samples(processor, count, folder)
        title = f"{len(samples)} samples of the embedded mixture (LLaVA-UHD)"
    else:
        samples, words = simulated_samples(processor, count)
        title = f"{len(samples)} simulated samples, lengths divided by {SCALE} (LLaVA-1.5)"
    lengths = lengths_of(title, samples, words, model.config)
    batches = make_batches(samples, lengths, dataclasses.replace(sharing, devices=1))
    variants = {name: make_variant(model, each) for name, each in batches.items()}
    variants[PACKED] = make_variant(model, batches[PACKED], BY_SAMPLE)
    variants[MASKED] = make_variant(model, batches[PACKED])
    counts = {name: len(batches.get(name, batches[PACKED])) for name in variants}
    return Passes(lengths, learned(batches[PACKED]), counts, variants)
