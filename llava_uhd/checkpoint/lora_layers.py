"""Low-rank adapters in a model: their places, and merging them into the weights.

PEFT trains them and carries them beside the weights. Merging is plain algebra on tensors and needs
no library.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llava_uhd.checkpoint.weights import Tensors, listing
from llava_uhd.errors import UserError

# PEFT's name of the adapter inside a model.
NAME = "default"


@dataclass(frozen=True)
class LoraLayer:
    """The adapter of one linear layer with weight (out, in).

    Attributes:
        a: (r, in).
        b: (out, r).
        scaling: of the product ``b @ a``.
        magnitude: (out,) learned length of each row (DoRA), or None.
        bias: (out,) that is scaled and added to the layer's own, or None.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def merge(self, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight with the adapter in it, computed in float32 and rounded once.

        Args:
            weight: (out, in).
            dtype: of the result; None keeps the weight's.
        """
        merged = weight.float() + self.scaling * (self.b.float() @ self.a.float())
        if self.magnitude is not None:
            lengths = torch.linalg.norm(merged, dim=1)
            merged = (self.magnitude.float() / lengths).unsqueeze(1) * merged
        return merged.to(dtype or weight.dtype)


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was read.

    Attributes:
        folder: it came from.
        settings: its ``adapter_config.json``.
        layers: our path of each adapted linear layer, with its matrices.
    """

    folder: Path
    settings: dict[str, Any]
    layers: dict[str, LoraLayer]

    @property
    def recorded_base(self) -> str | None:
        """What it says it was trained on."""
        name = self.settings.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter belongs to an adapter that PEFT put into the model."""
    return bool(re.search(rf"\.lora_(A|B|magnitude_vector)\.{NAME}\.", name))


def base_name(name: str) -> str:
    """Name that a parameter had before an adapter was put around its layer."""
    return name.replace(".base_layer.", ".")


def path_pattern(names: Collection[str], others: Iterable[str]) -> str:
    r"""A regular expression that matches exactly these paths, short where layers repeat.

    Args:
        names: paths to match.
        others: paths of the model, among them those that must not match.

    Example: ``model.layers.0.mlp.up_proj`` and ``model.layers.1.mlp.up_proj`` give
    ``model\.layers\.\d+\.mlp\.up_proj`` in a model of two layers.
    """
    templates = {re.sub(r"(?<=\.)\d+(?=\.)", "0", name) for name in names}
    parts = [re.escape(each).replace(r"\.0\.", r"\.\d+\.") for each in sorted(templates)]
    pattern = re.compile("|".join(parts))
    wanted = set(names)
    if all(name in wanted or not pattern.fullmatch(name) for name in others):
        return pattern.pattern
    return "|".join(re.escape(name) for name in sorted(names))


def fingerprint(state: Mapping[str, torch.Tensor]) -> list[float]:
    """A few numbers of a base that another base of the same shape does not share.

    They are of the embedding table, which is neither quantised nor adapted; empty without one.
    """
    names = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
    name = next((key for key in state if key.endswith(names) and state[key].ndim == 2), None)
    if name is None or 0 in state[name].shape:
        return []
    rows, columns = state[name].shape
    places = [(rows * i // 17, columns * (i + 1) // 19) for i in range(1, 17)]
    return [float(f"{state[name][row, column].item():.3g}") for row, column in places]


def other_base(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two fingerprints are of different weights, and not of one in two precisions."""
    if len(first) != len(second) or not first:
        return False
    largest = max(map(abs, (*first, *second)))
    return any(abs(a - b) > 0.02 * largest for a, b in zip(first, second, strict=True))


def check_fit(adapter: Adapter, state: Mapping[str, torch.Tensor], base: str) -> None:
    """Compares an adapter with the weights it is meant for.

    Args:
        adapter: as it was read.
        state: weights under the model's names.
        base: where they came from, for the message.

    Raises:
        UserError: layers that the base lacks or that have other shapes.
    """
    missing, shapes = [], []
    for name, layer in adapter.layers.items():
        weight = state.get(f"{name}.weight")
        wanted = (layer.b.shape[0], layer.a.shape[1])
        if weight is None:
            missing.append(name)
        elif tuple(weight.shape) != wanted:
            shapes.append(f"{name} is {tuple(weight.shape)}, the adapter is for {wanted}")
    if missing or shapes:
        problems = [listing("layers that it lacks", missing, 3), listing("other shapes", shapes, 3)]
        recorded = adapter.recorded_base
        hint = f" (recorded: '{recorded}')" if recorded else ""
        raise UserError(
            f"adapter {adapter.folder} does not fit {base}: {'; '.join(filter(None, problems))}: "
            f"pass base=FOLDER, the model it was trained on{hint}"
        )


def merge_adapter(adapter: Adapter, state: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """Weights with the adapter in them; the tensors given are left as they are.

    Args:
        adapter: that fits, see `check_fit`.
        state: weights under the model's names.
        dtype: of the merged weights; None keeps each one's own.

    Raises:
        UserError: an adapter with a bias on a layer without one.
    """
    merged = dict(state)
    for name, layer in adapter.layers.items():
        merged[f"{name}.weight"] = layer.merge(state[f"{name}.weight"], dtype)
        if layer.bias is not None:
            own = state.get(f"{name}.bias")
            if own is None:
                raise UserError(
                    f"adapter {adapter.folder} has a bias for {name}, which has none to merge it "
                    "into: load it with merge_lora=False"
                )
            bias = own.float() + layer.scaling * layer.bias.float()
            merged[f"{name}.bias"] = bias.to(dtype or own.dtype)
    return merged


def inject(model: PreTrainedModel, modules: Collection[str], **settings: Any) -> None:
    """Puts new adapters around linear layers of a model, in place.

    Args:
        model: a model of transformers; its own parameters keep their ``requires_grad``.
        modules: paths of the layers.
        **settings: of ``peft.LoraConfig``.

    Raises:
        UserError: the library is missing or refuses.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError("adapters need peft: bash install.sh --extras train")
    from peft import LoraConfig, inject_adapter_in_model

    known = {item.name for item in dataclasses.fields(LoraConfig)}
    options = {key: value for key, value in settings.items() if key in known}
    options["target_modules"] = path_pattern(modules, (name for name, _ in model.named_modules()))
    learning = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        with warnings.catch_warnings():
            # Remarks on models that PEFT knows other settings for.
            warnings.simplefilter("ignore")
            inject_adapter_in_model(LoraConfig(**options), model, NAME)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"peft: {' '.join(str(error).split())}") from error
    # The library freezes the whole model.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learning.get(base_name(name), True))
    # What transformers' own way of adding adapters sets: quantised weights may be trained below.
    model._hf_peft_config_loaded = True


def attach(model: PreTrainedModel, adapter: Adapter) -> None:
    """Puts a trained adapter into a model without merging it, frozen, in the model's dtype.

    Args:
        model: with all the adapter's layers, quantised or not.
        adapter: that fits, see `check_fit`.

    Raises:
        UserError: the library is missing or refuses.
    """
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
    settings = {key: adapter.settings[key] for key in keys if adapter.settings.get(key)}
    settings["lora_bias"] = any(layer.bias is not None for layer in adapter.layers.values())
    inject(model, adapter.layers, **settings)
    load_matrices(model, adapter)
    for name, parameter in model.named_parameters():
        if is_adapter_parameter(name):
            parameter.requires_grad_(False)


def load_matrices(model: PreTrainedModel, adapter: Adapter) -> None:
    """Fills adapters that are in a model already with trained values.

    Raises:
        UserError: the model's adapters are at other layers or of another rank.
    """
    state: Tensors = {}
    for name, layer in adapter.layers.items():
        state[f"{name}.lora_A.{NAME}.weight"] = layer.a
        state[f"{name}.lora_B.{NAME}.weight"] = layer.b
        if layer.magnitude is not None:
            state[f"{name}.lora_magnitude_vector.{NAME}.weight"] = layer.magnitude
        if layer.bias is not None:
            state[f"{name}.lora_B.{NAME}.bias"] = layer.bias
    own = {name: p for name, p in model.named_parameters() if is_adapter_parameter(name)}
    different = sorted(own.keys() ^ state.keys())
    shapes = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if different or shapes:
        problems = [listing("at other layers", different, 3), listing("other shapes", shapes, 3)]
        raise UserError(
            f"adapter {adapter.folder} is not like those of this model: "
            f"{'; '.join(filter(None, problems))}: give lora.r, lora.targets and lora.dora the "
            "values it was trained with"
        )
    model.load_state_dict(state, strict=False)
