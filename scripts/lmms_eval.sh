#!/bin/sh
# The task lists of LLaVA-OneVision through lmms-eval:
#   bash scripts/lmms_eval.sh CHECKPOINT_DIR image|video|interleave [options of lmms-eval]
# In an environment that has lmms-eval, see docs/harnesses.md. More than one process: NPROC.
# --dry-run prints the command. The status is not 0 where the harness wrote no results.
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/_common.sh"

case ${1:--} in -*) fail "which checkpoint? usage: bash scripts/lmms_eval.sh CHECKPOINT_DIR image|video|interleave" ;; esac
checkpoint=$(absolute "$1")
for folder in "$root/checkpoints" "$root/checkpoints_new"; do
    [ -e "$checkpoint" ] || [ ! -d "$folder/$1" ] || checkpoint=$folder/$1
done
shift
use_python
NPROC=$(processes)
export NPROC
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
exec "$python" -m llava_uhd.eval.adapters.lmms_run "$checkpoint" "$@"
