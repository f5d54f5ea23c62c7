"""What a run needs: estimates against what layers keep, a process holds and a run writes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_runs import run_here
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainingArguments,
)

from llava_uhd.errors import UserError
from llava_uhd.images.cost import language_shape
from llava_uhd.language.decoder import decode
from llava_uhd.train import preflight
from llava_uhd.train.compression import RunLength
from llava_uhd.train.memory import (
    Batch,
    Memory,
    SharingPlan,
    batch_memory,
    checkpoint_bytes,
    layer_bytes,
    model_bytes,
    state_memory,
)
from llava_uhd.train.preflight import Outlook, Room, check_room, gibibytes

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}
SHAPE |= {"num_attention_heads": 8}
DECODERS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


def kept_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of all tensors that a forward pass keeps for the backward pass, weights left out."""
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    seen: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("kind", DECODERS)
def test_activations_of_a_decoder(kind: str, kv_heads: int, learns: bool) -> None:
    """Within 5 % of what PyTorch keeps; with checkpointing within 10 %."""
    shape, make = DECODERS[kind]
    config = shape(**SHAPE, num_key_value_heads=kv_heads)
    model = make(config).train().requires_grad_(learns)
    embeds = torch.randn(2, 150, 256, requires_grad=True)
    expected = 300 * layer_bytes(language_shape(config), 4, learns) * 6

    def forward() -> Any:
        return decode(model, inputs_embeds=embeds, use_cache=False)

    assert kept_bytes(model, forward) == pytest.approx(expected, rel=0.05)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    kept = (6 + 2) * 300 * 256 * 4
    assert kept_bytes(model, forward) == pytest.approx(kept, rel=0.15)


def test_checkpointing_computes_one_layer_again() -> None:
    from fixtures_tiny import LLAMA, tiny_parts

    config = tiny_parts({**LLAMA, "num_hidden_layers": 40})[0].config
    learns, batch = {"language_model": True}, Batch(slots=100, learned=10)
    plain = batch_memory(config, batch, learns)
    again = batch_memory(config, batch, learns, checkpointing=True)
    assert again.activations < plain.activations / 10
    assert plain.logits == again.logits == 10 * config.text_config.vocab_size * 12
    half = batch_memory(config, batch, learns, torch.bfloat16)
    assert plain.activations / 2 < half.activations < plain.activations
    with_tower = batch_memory(
        config, dataclasses.replace(batch, grids=((4, 4),)), {**learns, "vision_tower": True}
    )
    assert with_tower.activations > plain.activations


def test_sharing() -> None:
    """ZeRO stages share optimizer, gradients and weights, in this order (arXiv 1910.02054)."""
    model = nn.Linear(1000, 1000, bias=False).to(torch.bfloat16)
    frozen = nn.Linear(1000, 100, bias=False).to(torch.bfloat16).requires_grad_(False)
    both = nn.ModuleList([model, frozen])

    def parts(plan: SharingPlan, optimizer: str = "adamw_torch") -> tuple[float, ...]:
        found = state_memory(both, plan, optimizer, masters=True)
        return found.weights / 1e6, found.gradients / 1e6, found.optimizer / 1e6

    assert parts(SharingPlan()) == pytest.approx((2.2, 2.0, 12.0))
    assert parts(SharingPlan(4, 1)) == pytest.approx((2.2, 2.0, 3.0))
    assert parts(SharingPlan(4, 2)) == pytest.approx((2.2, 0.5, 3.0))
    assert parts(SharingPlan(4, 3)) == pytest.approx((0.55, 0.5, 3.0))
    assert parts(SharingPlan(4, 3, offload=True))[2] == 0
    assert parts(SharingPlan(), "adamw_bnb_8bit")[2] == pytest.approx(6.0)


MEASURE = """
import json, os, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from llava_uhd.train.memory import SharingPlan, state_memory

def resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

torch.set_num_threads(1)
shape = json.loads(sys.argv[1])
warm = LlamaForCausalLM(LlamaConfig(**{**shape, "hidden_size": 64, "num_hidden_layers": 1}))
warm(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
torch.optim.AdamW(warm.parameters()).step()
before = resident()
model = LlamaForCausalLM(LlamaConfig(**shape))
optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
optimizer.step()
print(json.dumps([resident() - before, state_memory(model, SharingPlan()).state]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads /proc")
@pytest.mark.parametrize(("width", "layers"), [(256, 4), (512, 8)])
def test_state_against_a_process(width: int, layers: int) -> None:
    """Weights, gradients and optimizer within 15 % of what the process grows by."""
    shape = {"vocab_size": 4096, "hidden_size": width, "intermediate_size": 3 * width}
    shape |= {"num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8}
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(shape)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=240,
    )
    measured, estimated = json.loads(found.stdout.splitlines()[-1])
    assert estimated == pytest.approx(measured, rel=0.15)


def test_checkpoints_on_disk(tmp_path: Path) -> None:
    """Within 15 % of the files of a checkpoint that hold the state."""
    options = ("--trainer.max_steps", "1", "--trainer.save_steps", "1")
    folder = run_here(tmp_path, "debug/pretrain", "out", *options)
    (checkpoint,) = folder.glob("checkpoint-*")
    names = ("model.safetensors", "trainable.safetensors", "optimizer.pt")
    written = sum(
        (checkpoint / name).stat().st_size for name in names if (checkpoint / name).is_file()
    )
    from llava_uhd.checkpoint.load import load_pretrained
    from llava_uhd.config.recipe import load_recipe
    from llava_uhd.train.stages import apply_stage

    model, _ = load_pretrained(folder)
    apply_stage(model, load_recipe("debug/pretrain", []).stage)
    assert checkpoint_bytes(model) == pytest.approx(written, rel=0.15)


def outlook(**changes: Any) -> Outlook:
    values: dict[str, Any] = {
        "memory": Memory(weights=20e9, optimizer=60e9),
        "length": RunLength(10, 10, 1),
        "tokens": 100.0,
        "visual": 50.0,
        "longest": 200,
        "flops": None,
        "checkpoint": 50e9,
        "checkpoints": 2,
        "result": 14e9,
    }
    return Outlook(**{**values, **changes})


def test_what_cannot_fit_is_refused() -> None:
    """One line: what is needed, what is there, what helps."""
    check_room(outlook(), Room(90e9, "a large device", 200e9))
    with pytest.raises(UserError, match="most of it for optimizer .* zero2 or zero3") as caught:
        check_room(outlook(), Room(80e9, "NVIDIA A100", 200e9))
    assert "74.51 GiB on a device, NVIDIA A100 has 74.51 GiB" in str(caught.value)
    with pytest.raises(UserError, match=r"needs up to 106.17 GiB of disk .*save_total_limit 1"):
        check_room(outlook(), Room(90e9, "a large device", 100e9))
    assert gibibytes(float("inf")) == "unknown" and gibibytes(1e6) == "1.0 MiB"


def test_a_run_that_cannot_fit_never_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it is told to; the table is shown in both cases."""
    small = Room(1e5, "a watch", 1e12)
    monkeypatch.setattr(preflight, "room", lambda *_: small)
    words = ("--trainer.max_steps", "1")
    with pytest.raises(UserError, match="a watch has 0.1 MiB"):
        run_here(tmp_path, "debug/pretrain", "out", *words)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    folder = run_here(tmp_path, "debug/pretrain", "out", *words, "--trainer.check_room", "false")
    assert (folder / "model.safetensors").is_file()


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_here(tmp_path, "debug/pretrain", "out", "--trainer.max_steps", "2")
    shown = capsys.readouterr().out
    for word in ("Before the first step", "memory of a device", "of them visual", "tokens in all"):
        assert word in shown


def test_what_an_earlier_start_left_is_room(tmp_path: Path) -> None:
    """A run that goes on writes over its own checkpoints; weights that are loaded stay loaded."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    before = preflight.room(arguments, tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3/optimizer.pt").write_bytes(bytes(2**24))
    after = preflight.room(arguments, tmp_path, loaded=2.0**40)
    assert after.disk == pytest.approx(before.disk, abs=2**23)
    assert after.memory > 2.0**40


def test_the_result_is_what_learned(tmp_path: Path) -> None:
    model = nn.ModuleList([nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)])
    model[0].requires_grad_(False)
    assert (model_bytes(model), model_bytes(model, whole=False)) == (800, 400)
    assert checkpoint_bytes(model) == 100 * (4 + 8)
    assert checkpoint_bytes(model, masters=True) == 100 * (4 + 8 + 4)


PROJECTORS = {
    "spatial_resampler": {"type": "spatial_resampler"},
    "mlp2x_gelu": {"type": "mlp2x_gelu"},
    "hiwin": {"type": "hiwin", "scales": [1, 2]},
}


@pytest.mark.parametrize("kind", PROJECTORS)
def test_what_a_projector_keeps(kind: str) -> None:
    """Within 5 % of what PyTorch keeps of views of several shapes; nothing else changes."""
    from fixtures_tiny import tiny_parts

    from llava_uhd.train.kept import projector_bytes

    torch.manual_seed(0)
    model, _ = tiny_parts(projector=PROJECTORS[kind])
    projector = model.projector.train()
    width, patch = model.config.vision_config.hidden_size, model.config.image.patch_size
    grids = [(4, 4), (4, 3), (4, 4), (2, 4), (3, 4), (4, 4)]
    patches = sum(rows * columns for rows, columns in grids)

    def forward() -> Any:
        pixels = torch.zeros(patches, 3 * patch**2)
        return projector(torch.zeros(patches, width), torch.tensor(grids), pixels)

    before = torch.get_rng_state()
    estimate = projector_bytes(projector, width, patch, grids, 4)
    assert torch.equal(before, torch.get_rng_state())
    assert all(each.grad is None for each in projector.parameters())
    assert estimate == pytest.approx(kept_bytes(projector, forward), rel=0.05)
    assert projector_bytes(projector, width, patch, grids, 2) == estimate / 2
    assert projector_bytes(projector, width, patch, [], 4) == 0
