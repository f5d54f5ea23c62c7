#!/bin/sh
# Runs VLMEvalKit with our model in it:
#   bash scripts/vlmevalkit.sh CHECKPOINT_DIR --data OCRBench,MMMU_DEV_VAL,... [options of its run.py]
# VLMEVALKIT names the checkout; default: VLMEvalKit, here or in the repository. In an environment
# that has its packages, see docs/harnesses.md. More than one process: NPROC.
# --dry-run prints the command. The status is not 0 where a data set got no predictions.
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/_common.sh"

case ${1:--} in -*) fail "which checkpoint? usage: bash scripts/vlmevalkit.sh CHECKPOINT_DIR --data NAME,..." ;; esac
checkpoint=$(absolute "$1")
for folder in "$root/checkpoints" "$root/checkpoints_new"; do
    [ -e "$checkpoint" ] || [ ! -d "$folder/$1" ] || checkpoint=$folder/$1
done
shift
kit=$(absolute "${VLMEVALKIT:-VLMEvalKit}")
[ -n "${VLMEVALKIT:-}" ] || [ -e "$kit/run.py" ] || kit=$root/VLMEvalKit
VLMEVALKIT=$kit
export VLMEVALKIT
[ -z "${LMUData:-}" ] || LMUData=$(absolute "$LMUData") # already exported
launch llava_uhd.eval.adapters.vlmevalkit_run "$checkpoint" "$@"
