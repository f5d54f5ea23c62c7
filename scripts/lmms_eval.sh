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
# Only where it is not installed: the path would hide the entry point of an installed one.
if ! "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llava_uhd") is None)'; then
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH
fi
exec "$python" -m llava_uhd.eval.adapters.lmms_run "$checkpoint" "$@"
