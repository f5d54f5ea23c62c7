"""Several machines: what the launcher wants to know, what SLURM tells it, and a run on two."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures_runs import FROM_NOTHING, run_here, steps, weights, with_drawn_data

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ("NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")


def variables(**more: str) -> dict[str, str]:
    """The environment without a launcher's or SLURM's variables, and with these."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER and not name.startswith("SLURM_")
    }
    return {**kept, "VIRTUAL_ENV": sys.prefix, **more}


def dry_run(*words: str, **more: str) -> tuple[int, str]:
    """Status of a command that is only printed, and what it printed."""
    run = subprocess.run(
        ["sh", "pretrain.sh", "--dry-run", *words],
        cwd=ROOT,
        env=variables(**more),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return run.returncode, run.stdout + run.stderr


TWO = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "NPROC": "1"}


def test_variables_of_the_launcher() -> None:
    status, printed = dry_run(**TWO, MASTER_PORT="1234")
    where = "--nnodes 2 --node_rank 1 --master_addr first --master_port 1234 --nproc_per_node 1"
    assert status == 0
    assert f"-m llava_uhd.launch {where} -m llava_uhd.train" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"NODE_RANK": ""}, "NNODES=2 needs NODE_RANK on each machine: 0 on the first to 1"),
        ({"NODE_RANK": "2"}, "NODE_RANK=2: the machines of NNODES=2 are 0 to 1"),
        ({"NODE_RANK": "-1"}, "NODE_RANK=-1 is not the number of a machine"),
        ({"NODE_RANK": "a"}, "NODE_RANK=a is not the number of a machine"),
        ({"MASTER_ADDR": ""}, "NNODES=2 needs MASTER_ADDR, the address of machine 0"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http is not the number of a port"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is not the number of a port"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 is not the number of a port"),
        ({"NNODES": "two"}, "NNODES=two is not a number of machines"),
        ({"NNODES": "0"}, "NNODES=0 is not a number of machines"),
        ({"NNODES": "1:4"}, "NNODES=1:4 is not a number of machines"),
    ],
)
def test_mistakes_are_one_line_before_anything_waits(changes: dict[str, str], message: str) -> None:
    status, printed = dry_run(**{**TWO, **changes})
    assert status == 2
    assert printed.startswith(f"error: {message}") and printed.count("\n") == 1


# --- SLURM ----------------------------------------------------------------------------------------

# As in a task of `srun` that SLURM started on the second of three machines.
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "node[03-04,7],other1",
    "SLURM_NNODES": "3",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "3",
}


@pytest.mark.parametrize(
    ("machines", "first"),
    [
        ("node[03-04,7],other1", "node03"),
        ("a,b[1-2]", "a"),
        ("gpu-[5,8-9]-ib,x", "gpu-5-ib"),
        ("gpu-3,gpu-4", "gpu-3"),
    ],
)
def test_slurm_says_how_many_machines_which_and_where(machines: str, first: str) -> None:
    status, printed = dry_run(**{**SRUN, "SLURM_JOB_NODELIST": machines}, NPROC="8")
    where = f"--nnodes 3 --node_rank 1 --master_addr {first} --master_port 29500"
    assert status == 0 and f"{where} --nproc_per_node 8 -m" in printed


def test_the_users_own_variables_come_before_those_of_slurm() -> None:
    own = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    _, printed = dry_run(**SRUN, **own)
    assert "--nnodes 3 --node_rank 1 --master_addr 10.0.0.1 --master_port 4000 " in printed
    _, printed = dry_run(**SRUN, NNODES="1")
    assert "llava_uhd.launch" not in printed
    _, printed = dry_run(**SRUN, **TWO)
    assert "--nnodes 2 --node_rank 1 --master_addr first " in printed


def test_a_step_of_slurm_on_one_machine_is_an_ordinary_run() -> None:
    one = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"}
    status, printed = dry_run(**{**SRUN, **one})
    assert status == 0 and "llava_uhd.launch" not in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_STEP_ID": ""}, "SLURM gave 3 machines, this is one of them: srun"),
        ({"SLURM_STEP_NUM_TASKS": "24"}, "srun starts more than one task on a machine"),
        ({"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, "NNODES=3 needs MASTER_ADDR"),
    ],
)
def test_steps_of_slurm_that_would_wait_for_each_other(
    changes: dict[str, str], message: str
) -> None:
    status, printed = dry_run(**{**SRUN, **changes})
    assert status == 2
    assert printed.startswith(f"error: {message}") and printed.count("\n") == 1


# --- a run ----------------------------------------------------------------------------------------


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.mark.slow
def test_a_run_on_two_machines_is_that_of_one_process(tmp_path: Path) -> None:
    """Two launchers that know of each other only by the variables, each with a process."""
    workplace = with_drawn_data(tmp_path)
    words = ("--trainer.max_steps", "4", "--trainer.global_batch_size", "4", *FROM_NOTHING)
    # With learning rates at which rounding is not what decides a step of Adam.
    words = ("debug/finetune", *words, "--learning_rate", "1e-3", "--deepspeed", "null")
    alone = run_here(workplace, words[0], "alone", *words[1:])
    # The scripts work in the folder they lie in: the data of this one is drawn already.
    for name in ("llava_uhd", "scripts", "pretrain.sh", "finetune.sh"):
        (workplace / name).symlink_to(ROOT / name)
    command = ["bash", "finetune.sh", *words, "--trainer.output_dir", str(workplace / "two")]
    port, machines = free_port(), []
    try:
        for rank in ("0", "1"):
            where = {**TWO, "NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            machines.append(
                subprocess.Popen(
                    command,
                    cwd=workplace,
                    env=variables(**where, OMP_NUM_THREADS="1"),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )
        told = [each.communicate(timeout=240) for each in machines]
    finally:
        for each in machines:
            if each.poll() is None:
                os.killpg(each.pid, signal.SIGKILL)
    for each, (_, errors) in zip(machines, told, strict=True):
        assert each.returncode == 0, errors[-3000:]
    assert "final loss" in told[0][0] and "final loss" not in told[1][0]
    assert "x 2 devices" in told[0][0]
    expected, found = steps(alone), steps(workplace / "two")
    assert [entry["step"] for entry in found] == [1, 2, 3, 4]
    for one, two in zip(expected, found, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    ours, theirs = weights(workplace / "two"), weights(alone)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert float((ours[key] - tensor).abs().max()) < 1e-3, key
