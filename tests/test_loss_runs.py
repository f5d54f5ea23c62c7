"""The forms of the loss in runs: what is refused, Liger's kernels, weights that are shared out."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_runs import ROOT, run_here, run_on_two, steps
from torch import nn
from transformers import TrainingArguments

from llava_uhd.config.recipe import load_recipe
from llava_uhd.errors import UserError
from llava_uhd.language.decoder import LogitRule
from llava_uhd.train.log import read_log
from llava_uhd.train.loss import check_head, check_loss


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    for form in ("auto", "whole", "chunked"):
        check_loss(form, arguments)
        check_head(form, nn.Identity(), LogitRule(cap=30.0))
    found = importlib.util.find_spec

    def look(name: str, installed: bool) -> Any:
        return found("torch" if installed else "no_such") if name == "liger_kernel" else found(name)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: look(name, False))
    with pytest.raises(UserError, match=r"install\.sh --extras train,liger; or .*chunked"):
        check_loss("liger", arguments)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: look(name, True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a CUDA device, there is none"):
        check_loss("liger", arguments)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_loss("liger", arguments)
    arguments.fsdp, arguments.fsdp_config = [True], {"version": 2}
    with pytest.raises(UserError, match="ZeRO-3 and FSDP share out"):
        check_loss("liger", arguments)
    check_head("liger", nn.Linear(4, 4), LogitRule(scale=2.0))
    with pytest.raises(UserError, match="needs a plain linear head, this model's is a"):
        check_head("liger", nn.Sequential(nn.Linear(4, 4)), LogitRule())
    with pytest.raises(UserError, match="final_logit_softcapping 30"):
        check_head("liger", nn.Linear(4, 4), LogitRule(cap=30.0))
    with pytest.raises(UserError, match=r"trainer\.loss"):
        load_recipe("debug/finetune", ["--trainer.loss", "pieces"])


# --- Liger's kernels ------------------------------------------------------------------------------

LIGER = """
import torch
from torch import nn
from llava_uhd.language.decoder import LogitRule
from llava_uhd.language.loss import LossPlan, supervised_loss

def learn(form, learned, bias, frozen, rule, items):
    torch.manual_seed(0)
    head = nn.Linear(16, 70, bias=bias)
    head.weight.requires_grad_(not frozen)
    hidden = torch.randn(2, 6, 16, requires_grad=True)
    labels = torch.randint(70, (2, 6))
    labels.view(-1)[learned:] = -100
    with torch.no_grad():
        again = supervised_loss(head, hidden, labels, items, LossPlan(form), rule)
    loss = supervised_loss(head, hidden, labels, items, LossPlan(form), rule)
    loss.backward()
    torch.testing.assert_close(again, loss)
    return [loss, hidden.grad, *(each.grad for each in head.parameters() if each.requires_grad)]

for case in (
    (9, False, False, LogitRule(), None),
    (9, True, False, LogitRule(scale=0.5), torch.tensor(77)),
    (9, False, True, LogitRule(scale=2.0), 3),
    (0, False, False, LogitRule(), None),
):
    for one, other in zip(learn("liger", *case), learn("whole", *case), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="needs the extra 'liger'"
)
def test_liger() -> None:
    """The same numbers, by Triton's interpreter on the CPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", LIGER],
        capture_output=True,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.split()[-1] == "equal"


# --- weights that are shared out ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sharing", [("--deepspeed", "zero3"), ("--fsdp", "full_shard")])
def test_two_processes(
    sharing: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With unlike batches: the losses of one process with all logits at once."""
    if "zero3" in sharing and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs the extra 'deepspeed'")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    words = ["--debug", "--trainer.max_steps", "2", "--trainer.logging_steps", "1"]
    words += ["--data.holdout", "4", "--data.holdout_samples", "0", "--trainer.eval_steps", "2"]
    recipe = "onevision/stage2_ov_qwen2_7b"
    alone = run_here(
        tmp_path, recipe, "alone", *words, "--trainer.loss", "whole", "--deepspeed", "null"
    )
    own = ("--trainer.output_dir", "two", "--trainer.loss", "chunked", *sharing)
    run_on_two(tmp_path, recipe, *words, *own)
    expected, found = steps(alone), steps(tmp_path / "two")
    assert [entry["step"] for entry in found] == [1, 2]
    for one, two in zip(expected, found, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)

    def held_out(folder: Path) -> list[float]:
        return [entry["eval_loss"] for entry in read_log(folder) if "eval_loss" in entry]

    assert held_out(tmp_path / "two") == pytest.approx(held_out(alone), abs=1e-4)
    assert len(held_out(alone)) == 1
