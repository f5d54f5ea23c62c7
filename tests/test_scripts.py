"""The installer and the launchers, over a stand-in interpreter that tells what it should run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava_uhd.config.training import DEEPSPEED_NAMES

ROOT = Path(__file__).resolve().parents[1]
SHELLS = [name for name in ("dash", "bash", "sh") if shutil.which(name)]

# Answers the questions of the scripts; everything that would run is written to $ASKED instead.
STAND_IN = """#!/bin/sh
here=$(dirname "$0")
case "$*" in
*version_info* | *transformers* | *"pip --version"*) exit 0 ;;
*'find_spec("torch")'*) [ -e "$here/torch" ]; exit ;;
*metadata*) echo "2.13.0+cpu none" ;;
*device_count*) echo 1 ;;
*"pip install"*"$REFUSE"*) [ -z "$REFUSE" ] || exit 7 ;;
esac
case "$*" in
-c*) exit 0 ;;
*torch==*+cpu) [ -z "${NO_LOCAL:-}" ] || exit 7 ;;
esac
case "$*" in
*"pip install"*torch==*) : >"$here/torch" ;;
esac
printf '%s\\n' "$PWD: $*" >>"$ASKED"
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Variables of an active environment whose python is the stand-in."""
    python = tmp_path / "env/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN)
    python.chmod(0o755)
    dropped = ("NPROC", "NNODES", "MASTER_ADDR", "MASTER_PORT", "CONDA_PREFIX", "TORCH_VERSION")
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    return {
        **inherited,
        "VIRTUAL_ENV": str(tmp_path / "env"),
        "ASKED": str(tmp_path / "asked"),
        "REFUSE": "",
    }


def call(
    environment: dict[str, str], *words: str, cwd: Path = ROOT, **more: str
) -> tuple[int, str, list[str]]:
    """Status, standard error and the commands that would have run."""
    asked = Path(environment["ASKED"])
    asked.unlink(missing_ok=True)
    run = subprocess.run(
        words, env={**environment, **more}, cwd=cwd, capture_output=True, text=True, check=False
    )
    lines = asked.read_text().splitlines() if asked.exists() else []
    return run.returncode, run.stdout + run.stderr, lines


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pretrain.sh"], "llava_uhd.train uhd_v1/pretrain_vicuna7b"),
        (["finetune.sh"], "llava_uhd.train uhd_v1/finetune_vicuna7b"),
        (["finetune.sh", "--debug"], "llava_uhd.train uhd_v1/finetune_vicuna7b --debug"),
        (["pretrain.sh", "a/b", "--c.d", "e f"], "llava_uhd.train a/b --c.d e f"),
        (["eval.sh", "folder"], "llava_uhd.eval run folder"),
        (["scripts/train.sh"], "llava_uhd.train.sequence uhd_v2/vicuna7b"),
        (["scripts/train.sh", "--debug"], "llava_uhd.train.sequence uhd_v2/vicuna7b --debug"),
        (["scripts/train.sh", "a/b", "--x", "1"], "llava_uhd.train.sequence a/b --x 1"),
        (["model-train.sh"], "llava_uhd.train.sequence uhd_v2/vicuna7b --evaluate"),
        (["model-train.sh", "a", "--x"], "llava_uhd.train.sequence a --x --evaluate"),
        (["eval.sh", "folder", "a,b", "--x", "1"], "llava_uhd.eval run folder --tasks a,b --x 1"),
        (["eval.sh", "folder", "--x", "1"], "llava_uhd.eval run folder --x 1"),
    ],
)
def test_launchers(
    environment: dict[str, str], shell: str, words: list[str], expected: str
) -> None:
    # The commands of the repository's root are also under scripts, but for those two.
    places = ("", "scripts/") if words[0] in ("pretrain.sh", "finetune.sh", "eval.sh") else ("",)
    for folder in places:
        status, _, asked = call(environment, shell, folder + words[0], *words[1:])
        assert status == 0
        assert asked == [f"{ROOT}: -m {expected}"]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("script", ["vdim-pretrain.sh", "scripts/vdim_pretrain.sh"])
def test_vdim_launcher(environment: dict[str, str], shell: str, script: str) -> None:
    module = "-m llava_uhd.train.vdim"
    status, _, asked = call(environment, shell, script)
    assert (status, asked) == (0, [f"{ROOT}: {module} vdim/better"])
    _, _, asked = call(
        environment, shell, script, "vdim/published", "--data.root", "a b", NPROC="2"
    )
    torchrun = f"{ROOT}: -m llava_uhd.launch --standalone --nproc_per_node 2"
    assert asked == [f"{torchrun} {module} vdim/published --data.root a b"]
    _, _, asked = call(environment, shell, script, "--debug")
    assert asked == [f"{ROOT}: {module} vdim/better --debug"]


def test_several_processes_and_machines(environment: dict[str, str]) -> None:
    torchrun = f"{ROOT}: -m llava_uhd.launch"
    rest = "-m llava_uhd.train uhd_v1/pretrain_vicuna7b"
    status, _, asked = call(environment, "sh", "pretrain.sh", NPROC="2")
    assert (status, asked) == (0, [f"{torchrun} --standalone --nproc_per_node 2 {rest}"])
    machines = {"NNODES": "2", "NODE_RANK": "1", "NPROC": "8", "MASTER_ADDR": "first"}
    status, _, asked = call(environment, "sh", "pretrain.sh", **machines)
    where = "--nnodes 2 --node_rank 1 --master_addr first --master_port 29500"
    assert (status, asked) == (0, [f"{torchrun} {where} --nproc_per_node 8 {rest}"])
    for wrong in ({"NNODES": "2"}, {"NPROC": "many"}, {"NPROC": "0"}):
        status, output, asked = call(environment, "sh", "pretrain.sh", **wrong)
        assert (status, asked) == (2, [])
        assert output.startswith("error: ") and output.count("\n") == 1


@pytest.mark.slow
def test_a_mistake_is_one_line_in_several_processes() -> None:
    variables = {**os.environ, "VIRTUAL_ENV": sys.prefix, "NPROC": "2"}
    run = subprocess.run(
        ["sh", "pretrain.sh", "nothing/like_it"],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: unknown recipe") and run.stderr.count("\n") == 1


def test_paths_count_from_where_the_user_stands(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "model").mkdir()
    _, _, asked = call(environment, "sh", str(ROOT / "pretrain.sh"), "mine.yaml", cwd=tmp_path)
    assert asked == [f"{ROOT}: -m llava_uhd.train {tmp_path}/mine.yaml"]
    _, _, asked = call(environment, "sh", str(ROOT / "eval.sh"), "model", cwd=tmp_path)
    assert asked == [f"{ROOT}: -m llava_uhd.eval run {tmp_path}/model"]


@pytest.mark.parametrize("shell", SHELLS)
def test_eval_without_a_checkpoint(environment: dict[str, str], shell: str) -> None:
    for words in ([], ["--tasks", "a"]):
        status, output, asked = call(environment, shell, "eval.sh", *words)
        assert (status, asked) == (2, [])
        assert "which checkpoint" in output


def checkout(folder: Path) -> Path:
    """A copy of what the installer and the launchers need."""
    copy = folder / "copy of the repository"
    (copy / "scripts").mkdir(parents=True)
    for name in (
        "install.sh",
        "pyproject.toml",
        "eval.sh",
        "scripts/_common.sh",
        "scripts/eval.sh",
    ):
        shutil.copy(ROOT / name, copy / name)
    return copy


def test_eval_looks_under_checkpoints(environment: dict[str, str], tmp_path: Path) -> None:
    copy = checkout(tmp_path)
    (copy / "checkpoints_new/mine").mkdir(parents=True)
    _, _, asked = call(environment, "sh", str(copy / "eval.sh"), "mine", "a")
    assert asked == [f"{copy}: -m llava_uhd.eval run {copy}/checkpoints_new/mine --tasks a"]


def test_nothing_installed(environment: dict[str, str], tmp_path: Path) -> None:
    copy = checkout(tmp_path)
    (tmp_path / "env/bin/python").write_text("#!/bin/sh\nexit 1\n")
    bare = {"PATH": f"{tmp_path / 'env/bin'}:/usr/bin:/bin"}
    (tmp_path / "env/bin/python3").symlink_to("python")
    status, output, _ = call(environment, "sh", str(copy / "eval.sh"), "mine", **bare)
    assert status == 2
    assert output == "error: llava_uhd is not installed here; run: bash install.sh\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_install(environment: dict[str, str], tmp_path: Path, shell: str) -> None:
    copy = checkout(tmp_path)
    install = [shell, str(copy / "install.sh"), "--cpu"]
    status, _, asked = call(environment, *install, "--extras", "train,dev")
    assert status == 0
    torch, package = (line.partition(" -m pip install ")[2] for line in asked)
    assert torch == "-qq torch==2.13.0+cpu"  # alone, and a build that has no CUDA
    assert package.endswith(f"--editable {copy}[train,dev]") and "--constraint" in package
    status, output, asked = call(environment, *install, "--extras", "dev")
    assert (status, asked) == (0, []) and "nothing to do" in output
    _, _, asked = call(environment, *install, "--extras=quickstart")
    assert len(asked) == 1 and asked[0].endswith("[quickstart]")
    status, output, asked = call(environment, *install, "--extras", "dev,train,quickstart")
    assert (status, asked) == (0, []) and "nothing to do" in output
    (copy / "pyproject.toml").write_text((copy / "pyproject.toml").read_text() + "\n")
    _, _, asked = call(environment, *install)
    assert len(asked) == 1 and asked[0].endswith(f"--editable {copy}")


def test_install_falls_back_to_the_cpu_index(environment: dict[str, str], tmp_path: Path) -> None:
    copy = checkout(tmp_path)
    install = ["sh", str(copy / "install.sh"), "--cpu"]
    status, output, asked = call(environment, *install, REFUSE="-qq torch==")
    assert (status, asked) == (1, [])
    assert "whl/cpu" in output and "error: torch 2.13.0 could not be installed" in output
    status, _, asked = call(environment, *install, NO_LOCAL="1")
    index = "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert status == 0 and asked[0].endswith(f"install -qq torch==2.13.0+cpu {index}")
    (tmp_path / "env/.llava_uhd_install").unlink()
    (tmp_path / "env/bin/torch").unlink()
    status, output, asked = call(environment, *install, REFUSE="--editable")
    assert status == 1 and len(asked) == 1 and "error: pip could not install" in output
    assert not (tmp_path / "env/.llava_uhd_install").exists()


def test_install_refuses(environment: dict[str, str], tmp_path: Path) -> None:
    copy = checkout(tmp_path)
    for words in (["--gpu"], ["--extras"], ["--extras", "nothing"], ["--extras", "a b;c"]):
        status, output, asked = call(environment, "sh", str(copy / "install.sh"), *words)
        assert (status, asked) == (2, [])
        assert output.startswith("error: ") and output.count("\n") == 1
    # A CUDA build was asked for and a CPU build is what came.
    status, output, asked = call(environment, "sh", str(copy / "install.sh"), "--cuda")
    assert status == 1 and len(asked) == 1 and "has torch 2.13.0+cpu" in output


def test_deepspeed_files() -> None:
    files = {path.stem: path for path in (ROOT / "scripts/deepspeed").glob("*.json")}
    assert set(files) == set(DEEPSPEED_NAMES)
    for name, path in files.items():
        values = json.loads(path.read_text())
        assert "scheduler" not in values  # the trainer's own is used
        zero = values["zero_optimization"]
        assert zero["stage"] == (2 if name == "zero2" else 3)
        assert ("offload_optimizer" in zero) == name.endswith("offload")
        assert zero.get("stage3_gather_16bit_weights_on_model_save", name == "zero2")
