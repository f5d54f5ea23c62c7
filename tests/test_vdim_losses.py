"""VDIM pre-training against the original: jitter, downsamplers, losses, one whole step."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from llava_uhd.config.vdim import VdimConfig
from llava_uhd.train.vdim.downsampler import (
    AttentionDownsampler,
    SimpleDownsampler,
    gaussian_blur,
)
from llava_uhd.train.vdim.draws import Draws, seed_of
from llava_uhd.train.vdim.jitter import Jitter, JitterRange, apply_jitter, sample_jitter
from llava_uhd.train.vdim.losses import crf_loss, entropy, reconstruction_loss, tv_loss
from llava_uhd.train.vdim.module import Projection, VdimModule, enlarge
from llava_uhd.train.vdim.resample import Resampling

CLOSE: dict[str, float] = {"atol": 2e-6, "rtol": 1e-5}


# --- jitter ---------------------------------------------------------------------------------------


def test_golden_jitter(golden: Path) -> None:
    tensors = load_file(golden / "uhd_v2/jitter.safetensors")
    facts = json.loads((golden / "uhd_v2/jitter.json").read_text())
    for index, case in enumerate(facts["cases"]):
        jitter = Jitter(case["x"], case["y"], case["zoom"], case["flip"])
        view = apply_jitter(tensors["img"], jitter, case["max_pad"])
        torch.testing.assert_close(view, tensors[f"out{index}"], **CLOSE)


def test_golden_jitter_draws(golden: Path) -> None:
    facts = json.loads((golden / "uhd_v2/jitter.json").read_text())
    given = facts["sample_args"]
    limits = JitterRange(given["max_pad"], given["max_zoom"], given["use_flips"])
    for case in facts["sampled"]:
        seed = case.pop("seed")
        generator = torch.Generator().manual_seed(seed)
        drawn = sample_jitter(limits, (given["h"], given["w"]), random.Random(seed), generator)
        assert drawn == Jitter(**case)


def test_draws_follow_from_their_seed() -> None:
    def all_of(seed: int) -> list[Any]:
        draws = Draws(seed)
        jitter = draws.jitter(JitterRange(4, 2.0), (32, 24))
        rest = [draws.projection(2, 5, 3), draws.keep(2, 4, 3), draws.points((32, 24), 50)]
        return [jitter, *(tensor.flatten().tolist() for tensor in rest)]

    assert all_of(5) == all_of(5) != all_of(6)
    points = Draws(0).points((3, 500), 400)
    assert points[0].max() == 2 and points[1].max() > 400 and points.min() == 0
    assert len({seed_of(0, step, place) for step in range(50) for place in range(4)}) == 200
    assert seed_of(1, 2) != seed_of(2, 1)


def test_a_view_never_leaves_the_padded_picture() -> None:
    limits = JitterRange(6, 2.0)
    picture = torch.arange(32.0 * 24).view(1, 1, 32, 24)
    seen = set()
    for seed in range(60):
        jitter = Draws(seed).jitter(limits, (32, 24))
        assert apply_jitter(picture, jitter, 6).shape == picture.shape
        seen.add((jitter.flip, jitter.zoom > 1))
    assert len(seen) == 4


@pytest.mark.parametrize("blur", [False, True])
def test_products_equal_the_plain_chain(blur: bool) -> None:
    """Enlarge, jitter, blur: as two matrix products, and one after another."""
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 6, 8, requires_grad=True)
    weights = torch.randn(2, 3, 48, 64)
    for seed in range(12):
        jitter = Draws(seed).jitter(JitterRange(7, 2.0), (48, 64))
        fast = Resampling((48, 64), jitter, 7, blur)(maps)
        plain = apply_jitter(enlarge(maps, (48, 64)), jitter, 7)
        plain = gaussian_blur(plain) if blur else plain
        torch.testing.assert_close(fast, plain, **CLOSE)
        grads = [torch.autograd.grad((x * weights).sum(), maps)[0] for x in (fast, plain)]
        torch.testing.assert_close(*grads, atol=2e-5, rtol=1e-5)


def test_blur_is_a_gaussian_with_reflected_borders() -> None:
    maps = torch.randn(2, 2, 9, 7)
    axis = torch.exp(-(torch.arange(-2.0, 3) ** 2) / 2)
    kernel = torch.outer(axis, axis) / axis.sum() ** 2
    padded = F.pad(maps, [2] * 4, mode="reflect")
    expected = F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None]).view_as(maps)
    torch.testing.assert_close(gaussian_blur(maps), expected, **CLOSE)


# --- downsamplers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attn_downsampler", "attn_downsampler_noblur"])
def test_golden_attention_downsampler(golden: Path, name: str) -> None:
    tensors = load_file(golden / f"uhd_v2/{name}.safetensors")
    own = {key[2:]: tensor for key, tensor in tensors.items() if key.startswith("w.")}
    width = own["attention_net.1.weight"].shape[1]
    module = AttentionDownsampler(width, own["w"].shape[0], blur="noblur" not in name).eval()
    module.load_state_dict(own)
    maps = tensors["hr_feats"].clone().requires_grad_()
    output = module(maps, tensors["keep_uniform"])
    torch.testing.assert_close(output, tensors["output"], **CLOSE)
    torch.testing.assert_close(
        module.pixel_logits(tensors["hr_feats"]), tensors["forward_attention"], **CLOSE
    )
    output.backward(tensors["grad_output"])
    torch.testing.assert_close(maps.grad, tensors["grad_hr_feats"], **CLOSE)
    for key, parameter in module.named_parameters():
        torch.testing.assert_close(
            parameter.grad, tensors[f"grad.{key}"], atol=2e-6, rtol=1e-4, msg=key
        )
    assert torch.equal(tensors["keep_mask"] > 0, tensors["keep_uniform"] > 0.2)


def test_golden_simple_downsampler(golden: Path) -> None:
    tensors = load_file(golden / "uhd_v2/simple_downsampler.safetensors")
    module = SimpleDownsampler(tensors["kernel_params"].shape[0])
    module.load_state_dict({"kernel_params": tensors["kernel_params"]})
    torch.testing.assert_close(module.kernel(), tensors["kernel"], **CLOSE)
    torch.testing.assert_close(module(tensors["imgs"]), tensors["output"], **CLOSE)


def test_downsamplers_average_a_constant_map_to_itself() -> None:
    for module in (AttentionDownsampler(3, 4), SimpleDownsampler(4)):
        module.reset_weights()
        small = module.eval()(torch.full((2, 3, 8, 12), 1.5), torch.rand(2, 2, 3, 1))
        torch.testing.assert_close(small, torch.full((2, 3, 2, 3), 1.5))
        with pytest.raises(ValueError, match="no whole windows of 4"):
            module(torch.zeros(1, 3, 8, 9))


@pytest.mark.parametrize("kind", ["attention", "simple"])
def test_resampled_windows_from_the_small_map(kind: str) -> None:
    """The form that never makes the large map, and the plain one."""
    torch.manual_seed(0)
    module: AttentionDownsampler | SimpleDownsampler
    module = AttentionDownsampler(3, 8) if kind == "attention" else SimpleDownsampler(8)
    module.reset_weights()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    module.eval()
    maps = torch.randn(2, 3, 12, 16, requires_grad=True)
    keep, weights = torch.rand(2, 6, 8, 1), torch.randn(2, 3, 6, 8)
    for seed in range(6):
        jitter = Draws(seed).jitter(JitterRange(7, 2.0), (48, 64))
        fast = module.pool_resampled(maps, Resampling((48, 64), jitter, 7, module.blur), keep)
        plain = module(apply_jitter(enlarge(maps, (48, 64)), jitter, 7), keep)
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
        tensors = [maps, *module.parameters()]
        first, second = (torch.autograd.grad((x * weights).sum(), tensors) for x in (fast, plain))
        for one, other in zip(first, second, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


# --- losses ---------------------------------------------------------------------------------------


def test_golden_losses(golden: Path) -> None:
    tensors = load_file(golden / "uhd_v2/losses.safetensors")
    features = tensors["crf_features"].clone().requires_grad_()
    points = torch.cat([tensors["crf_rows"], tensors["crf_cols"]]).long()
    loss = crf_loss(tensors["crf_guidance"], features, points)
    loss.backward()
    torch.testing.assert_close(loss, tensors["crf_loss"], atol=0, rtol=1e-5)
    torch.testing.assert_close(features.grad, tensors["crf_grad_features"], **CLOSE)
    maps = tensors["tv_input"].clone().requires_grad_()
    variation = tv_loss(maps)
    variation.backward()
    torch.testing.assert_close(variation, tensors["tv_loss"], atol=0, rtol=1e-5)
    torch.testing.assert_close(maps.grad, tensors["tv_grad"], **CLOSE)
    for name in ("entropy", "entropy_zero"):
        found = entropy(tensors[f"{name}_input"])
        torch.testing.assert_close(found, tensors[name], atol=0, rtol=1e-5)


def test_the_best_deviation_is_the_error() -> None:
    guess, target = torch.zeros(1, 4, 2, 2), torch.full((1, 4, 2, 2), 0.3)
    losses = {
        deviation: float(reconstruction_loss(guess, target, torch.full((1, 1, 2, 2), deviation)))
        for deviation in (0.1, 0.2, 0.3, 0.4, 0.8)
    }
    assert min(losses, key=lambda deviation: losses[deviation]) == 0.3
    assert float(reconstruction_loss(guess, target, None)) == pytest.approx(0.09)


def test_projected_lengths() -> None:
    features = torch.randn(2, 16, 3, 3)
    projection = Projection.drawn(features, Draws(0), 4)
    assert projection.matrix is not None
    torch.testing.assert_close(projection.matrix.norm(dim=1), torch.ones(2, 4))
    expected = torch.einsum("bchw,bcd->bdhw", features, projection.matrix)
    torch.testing.assert_close(projection(features), expected)
    assert torch.equal(Projection.drawn(features, Draws(0), None)(features), features)


# --- one whole step -------------------------------------------------------------------------------


class Conv(nn.Module):
    """The one-layer featuriser of the golden step."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.width, self.patch = width, patch
        self.conv = nn.Conv2d(3, width, patch, stride=patch)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.conv(pictures)


class Recorded(Draws):
    """Plays back what the original drew, in its order."""

    def __init__(self, tensors: dict[str, torch.Tensor], jitters: list[dict[str, Any]]) -> None:
        self.jitters = iter([Jitter(**each) for each in jitters])
        names = ("projection_normal", "keep_uniform", "crf_index")
        self.streams = {name: self.stream(tensors, name) for name in names}

    @staticmethod
    def stream(tensors: dict[str, torch.Tensor], name: str) -> Any:
        return iter([tensors[f"{name}.{i}"] for i in range(9) if f"{name}.{i}" in tensors])

    def jitter(self, limits: JitterRange, size: tuple[int, int]) -> Jitter:
        return next(self.jitters)

    def projection(self, batch: int, width: int, to: int) -> torch.Tensor:
        return next(self.streams["projection_normal"])

    def keep(self, batch: int, rows: int, columns: int, control: bool = False) -> torch.Tensor:
        return (
            torch.ones(batch, rows, columns, 1) if control else next(self.streams["keep_uniform"])
        )

    def points(self, size: tuple[int, int], count: int) -> torch.Tensor:
        index = self.streams["crf_index"]
        return torch.cat([next(index), next(index)]).long()


def our_name(published: str) -> str:
    """Name in the module. Example: ``scale_net.net.bias``: ``heads.4x.scale_net.net.bias``."""
    part, _, rest = published.partition(".")
    kind, _, _ = part.partition("_2x")
    if part == "model":
        return f"features.{rest}"
    if kind not in ("downsampler", "scale_net"):
        return published
    return f"heads.{'2x' if part.endswith('_2x') else '4x'}.{kind}.{rest}"


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("control", [False, True])
def test_golden_training_step(golden: Path, reuse: bool, control: bool) -> None:
    """Losses, every gradient and the total norm; also with maps made once, or with a control."""
    tensors = load_file(golden / "uhd_v2/vdim_training_step.safetensors")
    facts = json.loads((golden / "uhd_v2/vdim_training_step.json").read_text())
    config = VdimConfig(
        scale=4, detach=True, reuse_maps=reuse, crf_jittered=False, control=control,
        n_jitters=facts["n_jitters"], max_pad=facts["max_pad"], crf_weight=facts["crf_weight"],
        random_projection=facts["random_projection"], crf_points=facts["crf_n_samples"],
    )  # fmt: skip
    module = VdimModule(Conv(facts["feat_dim"], facts["patch"]), config)  # type: ignore[arg-type]
    module.reset_weights()
    own = {our_name(key[2:]): tensor for key, tensor in tensors.items() if key[:2] == "w."}
    missing, surplus = module.load_state_dict(own, strict=False)
    assert not surplus and all(name.startswith("heads.1x.") for name in missing)
    module.eval()
    draws = Recorded(tensors, facts["jitters"])
    outputs = module(tensors["img"], draws=draws)
    assert next(draws.streams["crf_index"], None) is None, "everything drawn was used"
    parts = {name: float(value.detach()) for name, value in outputs.items()}
    total = float(tensors["loss_all.0"] + tensors["loss_all.1"])
    assert parts["total"] == pytest.approx(total, rel=1e-5)
    assert parts["total"] == pytest.approx(facts["logged"]["loss/total"], rel=1e-5)
    crf = parts["crf_4x"] + parts["crf_2x"]
    assert crf == pytest.approx(facts["logged"]["loss/crf_4x"], rel=1e-5)
    assert parts["loss"] == pytest.approx(total + parts.get("rec_1x", 0.0), rel=1e-5)
    outputs["loss"].backward()
    learning = dict(module.named_parameters())
    for key in [key for key in tensors if key.startswith("grad.")]:
        name = our_name(key.removeprefix("grad."))
        largest = float(tensors[key].abs().max())
        torch.testing.assert_close(
            learning.pop(name).grad, tensors[key], atol=1e-4 * largest, rtol=1e-4, msg=name
        )
    rest = [name for name, parameter in learning.items() if parameter.requires_grad]
    assert all(name.startswith("heads.1x.") for name in rest)
    norm = nn.utils.clip_grad_norm_(module.learning(control=False), 1e9)
    assert float(norm) == pytest.approx(facts["total_grad_norm"], rel=1e-5)


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("detach", [False, True])
def test_maps_made_once_give_the_gradients_of_maps_made_anew(scale: int, detach: bool) -> None:
    torch.manual_seed(0)
    pictures = torch.randn(2, 3, 32, 32)
    features = Conv(6, 8)
    gradients = []
    state: dict[str, torch.Tensor] = {}
    for reuse in (True, False):
        config = VdimConfig(
            scale=scale, reuse_maps=reuse, detach=detach, n_jitters=3, max_pad=3, crf_points=20,
            tv_weight=0.1, random_projection=None,
        )  # fmt: skip
        module = VdimModule(features, config)  # type: ignore[arg-type]
        module.reset_weights()
        state = state or module.state_dict()
        module.load_state_dict(state)
        module.eval()(pictures, seed=3)["loss"].mul(2.0).backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.requires_grad})
    first, second = gradients
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        assert gradient is not None and (gradient.any() or "fixup_proj." in name), name
        torch.testing.assert_close(gradient, second[name], atol=1e-5, rtol=1e-4, msg=name)
    assert ("heads.1x.downsampler.w" in first) and f"heads.{scale}x.downsampler.w" in first


@pytest.mark.parametrize("reuse", [True, False])
def test_bfloat16_autocast(reuse: bool) -> None:
    """Tower and stack in half precision, heads and losses in float32."""
    torch.manual_seed(0)
    pictures = torch.randn(2, 3, 32, 32)
    config = VdimConfig(reuse_maps=reuse, max_pad=3, crf_points=20, dropout=0.0)
    module = VdimModule(Conv(6, 8), config)  # type: ignore[arg-type]
    module.reset_weights()
    module.eval()
    found = []
    for half in (False, True):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs = module(pictures, seed=1)
        outputs["loss"].backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in module.learning()])
        found.append((float(outputs["loss"].detach()), gradients))
        assert outputs["loss"].dtype == torch.float32
    (loss, gradient), (half_loss, half_gradient) = found
    assert half_loss == pytest.approx(loss, rel=0.02) and half_loss != loss
    assert F.cosine_similarity(gradient, half_gradient, dim=0) > 0.99
