"""Evaluation as a user runs it: killed and started again, and on two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fixtures_model import ROOT, call, environment, start

from llava_uhd.data.synthetic import SyntheticConfig, generate
from llava_uhd.eval.__main__ import main

ITEMS = 60


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embedded data with 60 questions."""
    folder = tmp_path_factory.mktemp("many")
    generate(folder, SyntheticConfig(tiles=1, train=1, eval=ITEMS // 2))
    return folder


def words(checkpoint: Path, data: Path, output: Path, *more: str) -> list[str | Path]:
    return ["run", checkpoint, "--data-root", data, "--output", output, "--device", "cpu", *more]


@pytest.fixture(scope="module")
def unbroken(tiny_checkpoint: Path, many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results folder of one run without trouble, in batches."""
    output = tmp_path_factory.mktemp("unbroken") / "out"
    assert main([str(word) for word in words(tiny_checkpoint, many, output)]) == 0
    return output


def logged(output: Path) -> list[str]:
    """Ids in all log files, whole lines only."""
    found = []
    for path in sorted(output.glob("synthetic/log.rank*.jsonl")):
        lines = path.read_bytes().split(b"\n")[:-1]
        found += [json.loads(line)["id"] for line in lines]
    return found


def outcome(output: Path) -> tuple[bytes, object]:
    """Merged answers as bytes, and the scores."""
    scores = json.loads((output / "results.json").read_text())["tasks"]["synthetic"]
    return (output / "synthetic/answers.jsonl").read_bytes(), scores["breakdown"]


@pytest.mark.slow
def test_killed_and_started_again(
    tiny_checkpoint: Path,
    many: Path,
    unbroken: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    given = words(tiny_checkpoint, many, output)
    process = start("llava_uhd.eval", *given, "--batch-size", "1", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while len(logged(output)) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = logged(output)
    assert 5 <= len(kept) < ITEMS
    assert not (output / "results.json").exists()
    with (output / "synthetic/log.rank0.jsonl").open("ab") as file:
        file.write(b'{"id": "0-sig')  # as if the kill had come within a line
    assert main([str(word) for word in given]) == 0
    assert f"going on, {ITEMS - len(kept)} of {ITEMS} items to do" in capsys.readouterr().err
    assert logged(output)[: len(kept)] == kept
    assert len(logged(output)) == len(set(logged(output))) == ITEMS
    assert outcome(output) == outcome(unbroken)


@pytest.mark.slow
def test_two_processes_give_the_same(
    tiny_checkpoint: Path, many: Path, unbroken: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    given = words(tiny_checkpoint, many, output)
    status, _, error = call(*launcher, "-m", "llava_uhd.eval", *given, cwd=tmp_path)
    assert status == 0, error
    parts = [
        (output / f"synthetic/log.rank{rank}.jsonl").read_text().splitlines() for rank in (0, 1)
    ]
    assert [len(part) for part in parts] == [ITEMS // 2, ITEMS // 2]
    assert outcome(output) == outcome(unbroken)
    # One process goes on where two have been.
    lines = (output / "synthetic/log.rank1.jsonl").read_text().splitlines(keepends=True)
    (output / "synthetic/log.rank1.jsonl").write_text("".join(lines[:10]))
    assert main([str(word) for word in given]) == 0
    assert len(logged(output)) == len(set(logged(output))) == ITEMS
    assert outcome(output) == outcome(unbroken)


@pytest.mark.slow
def test_a_mistake_is_one_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    given = ["run", tiny_checkpoint, "--data-root", tmp_path]
    status, out, error = call("llava_uhd.eval", *given, cwd=tmp_path)
    assert (status, out) == (2, "")
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "is missing; draw it with" in error


@pytest.mark.slow
def test_eval_script(tiny_checkpoint: Path, many: Path, tmp_path: Path) -> None:
    given = map(str, words(tiny_checkpoint, many, tmp_path / "out", "--limit", "2")[1:])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run = subprocess.run(
        ["sh", str(ROOT / "eval.sh"), next(given), "synthetic", *given],
        cwd=tmp_path,
        env=environment(VIRTUAL_ENV="", CONDA_PREFIX="", NPROC="1", PATH=path),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert f"{tmp_path}/out/results.md" in run.stdout and "sign_exact" in run.stdout
    assert "not comparable" in (tmp_path / "out/results.md").read_text()
