"""``bash scripts/lmms_eval.sh CHECKPOINT_DIR image|video|interleave [options of lmms-eval]``.

::

    python -m llava_uhd.eval.adapters.lmms_run CHECKPOINT_DIR SET [--dry-run] [options]

Runs the task lists that LLaVA-OneVision was measured with through lmms-eval, then looks whether
there are results: the harness leaves with status 0 also where it failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from llava_uhd.errors import UserError, command
from llava_uhd.eval.adapters.checkpoints import existing_checkpoint

# As published, spelling included.
TASK_LISTS = {
    "image": (
        "ai2d,chartqa,docvqa_val,infovqa_val,mme,realworldqa,mathvista_testmini,llava_in_the_wild,"
        "mmvet,mmbench_en_dev,ocrbench,mmmu,mathverse_testmini_vision_intensive,"
        "mathverse_testmini_vision_only,seedbench,scienceqa_img,mmstar"
    ),
    "video": (
        "activitynetqa,videochatgpt,nextqa_mc_test,egoschema,video_dc499,videmme,"
        "videomme_w_subtitle,perceptiontest_val_mc"
    ),
    "interleave": "llava-interleave-bench,muirbench,mmmu_test",
}
# What the harness calls them (0.7.3 knows the other names of the lists as they are).
HARNESS_NAMES = {"videmme": "videomme", "llava-interleave-bench": "llava_interleave_bench"}
RESULTS = "*_results.json"


def harness_tasks(names: str) -> str:
    """A list of tasks under the harness's names.

    Example: ``harness_tasks("egoschema,videmme")`` is ``"egoschema,videomme"``.
    """
    given = [name.strip() for name in names.split(",") if name.strip()]
    return ",".join(HARNESS_NAMES.get(name, name) for name in given)


def parse_arguments(words: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our own words, and those that go on to the harness."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_uhd.eval.adapters.lmms_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="folder, name under checkpoints/, or hub id")
    parser.add_argument("set", choices=TASK_LISTS, help="published list of tasks")
    parser.add_argument("--tasks", help="other tasks instead of the list")
    parser.add_argument("--model_args", default="", help="more of them: conv_template=qwen_1_5,...")
    parser.add_argument("--batch_size", default="1")
    parser.add_argument("--output_path", help="default: CHECKPOINT_DIR/eval-lmms-SET")
    parser.add_argument("--dry-run", action="store_true", help="print the command only")
    return parser.parse_known_args(words)


def make_command(
    options: argparse.Namespace, more: Sequence[str], checkpoint: Path | str, output: Path
) -> list[str]:
    """The command line of the harness.

    Raises:
        UserError: a path that its ``--model_args`` cannot hold, or a bad ``NPROC``.
    """
    if any(mark in str(checkpoint) for mark in ",="):
        raise UserError(f"lmms-eval cannot read '{checkpoint}': it has a comma or '=', link to it")
    count = os.environ.get("NPROC", "1")
    if not count.isdigit() or int(count) < 1:
        raise UserError(f"NPROC={count} is not a number of processes")
    start = ["-m", "lmms_eval"]
    if int(count) > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count]
        start = [*launcher, *start]
    model_args = ",".join(filter(None, [f"pretrained={checkpoint}", options.model_args]))
    return [
        *(sys.executable, *start),
        *("--model", "llava_uhd", "--model_args", model_args),
        *("--tasks", harness_tasks(options.tasks or TASK_LISTS[options.set])),
        *("--batch_size", options.batch_size),
        *("--log_samples", "--output_path", str(output)),
        *more,
    ]


def new_results(output: Path, since: float) -> list[Path]:
    """Result files under a folder that are not older than a moment, in seconds."""
    files = sorted(output.rglob(RESULTS)) if output.is_dir() else []
    return [file for file in files if file.stat().st_mtime >= since]


def check_results(output: Path, since: float) -> Path:
    """The newest results file of a run.

    Args:
        output: of the run.
        since: its start in seconds; clocks of file systems may be a second behind.

    Raises:
        UserError: there is none, or it has no results.
    """
    files = new_results(output, since - 1.5)
    if not files:
        raise UserError(
            f"lmms-eval wrote no {RESULTS} under {output}: it failed, see what it said above"
        )
    newest = max(files, key=lambda file: file.stat().st_mtime)
    try:
        found = json.loads(newest.read_text(encoding="utf-8")).get("results")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{newest} is damaged ({error})") from error
    if not found:
        raise UserError(f"{newest} has no results: lmms-eval failed, see what it said above")
    return newest


def check_environment() -> None:
    """Looks whether the harness is here and will find the plug-in.

    Raises:
        UserError: what is to be installed.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        raise UserError(
            f"lmms-eval is not installed for {sys.executable}: it needs an environment of its own, "
            "see docs/harnesses.md"
        )
    if "llava_uhd" not in entry_points(group="lmms_eval.models").names:
        raise UserError(
            f"{sys.executable} does not know the plug-in: run 'pip install --no-deps -e .' with it "
            "in the repository"
        )


def main(words: Sequence[str] | None = None) -> int:
    """Runs the harness; its status, or an error where it wrote no results."""
    options, more = parse_arguments(words)
    checkpoint = existing_checkpoint(options.checkpoint)
    place = checkpoint if isinstance(checkpoint, Path) else Path("checkpoints") / checkpoint
    output = Path(options.output_path or place / f"eval-lmms-{options.set}").absolute()
    line = make_command(options, more, checkpoint, output)
    if options.dry_run:
        print(shlex.join(line))
        return 0
    check_environment()
    start = time.time()
    status = subprocess.run(line, check=False).returncode
    if status:
        return status
    print(check_results(output, start))
    return 0


if __name__ == "__main__":
    command(main)
