"""``bash scripts/vlmevalkit.sh CHECKPOINT_DIR --data OCRBench,MMMU_DEV_VAL [options of the kit]``.

::

    python -m llava_uhd.eval.adapters.vlmevalkit_run CHECKPOINT_DIR --data A,B [options]

Registers our model in a checkout of VLMEvalKit and runs its ``run.py`` in this process, then looks
whether every data set has predictions: the kit leaves with status 0 also where it failed. The
checkout is the folder that ``VLMEVALKIT`` names, else ``VLMEvalKit``.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llava_uhd.errors import UserError, command
from llava_uhd.eval.adapters.checkpoints import existing_checkpoint
from llava_uhd.eval.protocols import PROTOCOLS

TABLES = (".xlsx", ".tsv", ".json")


def find_kit() -> Path:
    """The checkout.

    Raises:
        UserError: there is none.
    """
    named = os.environ.get("VLMEVALKIT")
    kit = Path(named or "VLMEvalKit").expanduser().absolute()
    if not (kit / "run.py").is_file():
        raise UserError(
            f"{kit} is no checkout of VLMEvalKit (it has no run.py): clone it, and name the folder "
            "by the variable VLMEVALKIT, see docs/harnesses.md"
        )
    return kit


def parse_arguments(words: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our own words, and those that go on to the kit's ``run.py``."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_uhd.eval.adapters.vlmevalkit_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="folder, name under checkpoints/, or hub id")
    parser.add_argument("--data", nargs="+", required=True, help="data sets, by commas or spaces")
    parser.add_argument(
        "--model",
        default="llava_uhd",
        choices=("llava_uhd", "llava_uhd2"),
        help="llava_uhd2: as published for LLaVA-UHD v2 (3 beams, resized, the first image only)",
    )
    parser.add_argument("--protocol", choices=PROTOCOLS.names(), help="default: by --model")
    parser.add_argument("--work-dir", help="default: CHECKPOINT_DIR/eval-vlmevalkit")
    parser.add_argument("--device", help="default: the best one, by process")
    parser.add_argument("--dtype", help="default: by device")
    parser.add_argument("--dry-run", action="store_true", help="print the kit's command only")
    return parser.parse_known_args(words)


def missing_predictions(work: Path, model: str, names: Sequence[str], since: float) -> list[str]:
    """Data sets without a table of predictions that is as new as a moment, in seconds."""
    files = [file for file in work.rglob(f"{model}_*") if file.suffix in TABLES]
    fresh = {file.stem for file in files if file.stat().st_mtime >= since}
    heads = [f"{model}_{name}" for name in names]
    return [
        name
        for name, head in zip(names, heads, strict=True)
        if not any(stem == head or _of_video(stem, head) for stem in fresh)
    ]


def _of_video(stem: str, head: str) -> bool:
    """Whether a table is that of a video data set, which adds frames to the name."""
    rest = stem.removeprefix(f"{head}_")
    return rest != stem and rest.split("_")[0].lstrip("0123456789.") in ("frame", "fps")


def without_scores(work: Path, model: str, names: Sequence[str]) -> list[str]:
    """Data sets with predictions only: a server scores them, or the kit failed."""
    stems = {file.stem for file in work.rglob(f"{model}_*")}
    heads = {name: f"{model}_{name}" for name in names}
    return [
        name
        for name, head in heads.items()
        if not any(s.startswith(head) and s != head and not _of_video(s, head) for s in stems)
    ]


def run_kit(kit: Path, words: Sequence[str]) -> None:
    """Runs ``run.py`` of a checkout here, where our model is registered.

    Raises:
        SystemExit: with another status than 0.
    """
    before, folder = sys.argv, Path.cwd()
    sys.argv = [str(kit / "run.py"), *words]
    os.chdir(kit)
    try:
        runpy.run_path(str(kit / "run.py"), run_name="__main__")
    except SystemExit as leaving:
        if leaving.code not in (0, None):
            raise
    finally:
        sys.argv = before
        os.chdir(folder)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the kit; an error where a data set has no predictions afterwards."""
    options, more = parse_arguments(words)
    names = [name for word in options.data for name in word.split(",") if name]
    checkpoint = existing_checkpoint(options.checkpoint)
    place = checkpoint if isinstance(checkpoint, Path) else Path("checkpoints") / checkpoint
    named = options.work_dir or os.environ.get("MMEVAL_ROOT")  # the kit's own variable
    work = Path(named or place / "eval-vlmevalkit").absolute()
    line = ["--data", *names, "--model", options.model, "--work-dir", str(work), *more]
    if options.dry_run:
        print(shlex.join(["run.py", *line]))
        return 0
    kit = find_kit()
    sys.path.insert(0, str(kit))
    from llava_uhd.eval.adapters.vlmevalkit import register

    given = {"protocol": options.protocol, "device": options.device, "dtype": options.dtype}
    try:
        register(str(checkpoint), **{name: value for name, value in given.items() if value})
    except ImportError as error:
        raise UserError(
            f"{kit} cannot be imported ({error}): it needs packages of its own, see "
            "docs/harnesses.md"
        ) from error
    start = time.time()
    run_kit(kit, line)
    if int(os.environ.get("RANK", "0")) > 0:
        return 0
    # A run that goes on with --reuse may find everything there already.
    since = 0.0 if "--reuse" in more else start - 1.5
    missing = missing_predictions(work, options.model, names, since)
    if missing:
        raise UserError(
            f"VLMEvalKit wrote no predictions of {', '.join(missing)} under {work}: it failed, see "
            "what it said above (where it left a .pkl, install xlsxwriter)"
        )
    unscored = [] if "infer" in more else without_scores(work, options.model, names)
    if unscored:
        print(
            f"no scores of {', '.join(unscored)}: a server has the answers, or see above what the "
            "kit said",
            file=sys.stderr,
        )
    print(work / options.model)
    return 0


if __name__ == "__main__":
    command(main)
