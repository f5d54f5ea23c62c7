"""``scripts/lmms_eval.sh``, against a stand-in for lmms-eval."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fixtures_harness import write_lmms
from fixtures_model import ROOT, environment

from llava_uhd.errors import UserError
from llava_uhd.eval.adapters import lmms_run

LISTS = {
    "image": "ai2d,chartqa,docvqa_val,infovqa_val,mme,realworldqa,mathvista_testmini,"
    "llava_in_the_wild,mmvet,mmbench_en_dev,ocrbench,mmmu,mathverse_testmini_vision_intensive,"
    "mathverse_testmini_vision_only,seedbench,scienceqa_img,mmstar",
    "video": "activitynetqa,videochatgpt,nextqa_mc_test,egoschema,video_dc499,videomme,"
    "videomme_w_subtitle,perceptiontest_val_mc",
    "interleave": "llava_interleave_bench,muirbench,mmmu_test",
}


def script(*words: str | Path, stub: Path, **more: str) -> subprocess.CompletedProcess[str]:
    known = environment(**{"VIRTUAL_ENV": sys.prefix, "NPROC": "1", **more})
    known["PYTHONPATH"] = str(stub)
    return subprocess.run(
        ["sh", str(ROOT / "scripts/lmms_eval.sh"), *map(str, words)],
        cwd=stub.parent,
        env=known,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


WORDS = ("--model_args", "conv_template=qwen_1_5,model_name=llava_qwen", "--limit", "2")


def check_dry_run(printed: str, name: str, checkpoint: Path) -> None:
    model = f"pretrained={checkpoint},conv_template=qwen_1_5,model_name=llava_qwen"
    assert f"--model llava_uhd --model_args {model} --tasks {LISTS[name]} " in printed
    assert "torch.distributed.run --standalone --nproc_per_node 2 -m lmms_eval" in printed
    assert printed.endswith(f"--output_path {checkpoint}/eval-lmms-{name} --limit 2\n")


@pytest.mark.parametrize("name", LISTS)
def test_dry_run(
    name: str,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NPROC", "2")
    assert lmms_run.main([str(tiny_checkpoint), name, *WORDS, "--dry-run"]) == 0
    check_dry_run(capsys.readouterr().out, name, tiny_checkpoint)


def test_script(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = script(tiny_checkpoint, "video", *WORDS, "--dry-run", stub=tmp_path, NPROC="2")
    assert done.returncode == 0, done.stderr
    check_dry_run(done.stdout, "video", tiny_checkpoint)
    bad = script(stub=tmp_path)
    assert bad.returncode == 2 and "which checkpoint?" in bad.stderr


@pytest.mark.slow
def test_command_wants_results(tiny_checkpoint: Path, tmp_path: Path) -> None:
    stub, out = write_lmms(tmp_path / "stub"), tmp_path / "out"
    words = (tiny_checkpoint, "image", "--output_path", out, "--tasks", "toy")
    failed = script(*words, stub=stub)
    assert failed.returncode == 2 and "wrote no *_results.json" in failed.stderr
    good = script(*words, stub=stub, STUB_RESULTS='{"toy": {"acc": 1}}')
    assert good.returncode == 0, good.stderr
    assert good.stdout.strip().endswith("_results.json")
    # What an earlier run wrote does not count, nor do results of nothing.
    file = next(out.rglob("*_results.json"))
    assert lmms_run.check_results(out, file.stat().st_mtime) == file
    with pytest.raises(UserError, match="wrote no"):
        lmms_run.check_results(out, file.stat().st_mtime + 5)
    for content, message in (('{"results": {}}', "has no results"), ("[1", "is damaged")):
        file.write_text(content, "utf-8")
        with pytest.raises(UserError, match=message):
            lmms_run.check_results(out, file.stat().st_mtime)


def test_command_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no does not exist"):
        lmms_run.main([str(tmp_path / "no"), "image", "--dry-run"])
    (tmp_path / "a,b").mkdir()
    with pytest.raises(UserError, match="a comma"):
        lmms_run.main([str(tmp_path / "a,b"), "image", "--dry-run"])
    monkeypatch.setattr(lmms_run.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "ab").mkdir()
    with pytest.raises(UserError, match="lmms-eval is not installed"):
        lmms_run.main([str(tmp_path / "ab"), "image"])
