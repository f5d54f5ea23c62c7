#!/bin/sh
# Evaluates a checkpoint: sh scripts/eval.sh CHECKPOINT_DIR [TASKS] [--options]
# A word without -- after the folder is the list of tasks. A bare name is also looked up under
# checkpoints/ and checkpoints_new/. Processes: as for pretrain.sh. --dry-run prints the command.
# Visual context compression at test time: --compression.layer 16 --compression.stride 8
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/_common.sh"

case ${1:--} in -*) fail "which checkpoint? usage: sh eval.sh CHECKPOINT_DIR [TASKS] [--options]" ;; esac
checkpoint=$(absolute "$1")
for folder in "$root/checkpoints" "$root/checkpoints_new"; do
    [ -e "$checkpoint" ] || [ ! -d "$folder/$1" ] || checkpoint=$folder/$1
done
shift
case ${1:--} in -*) ;; *)
    tasks=$1
    shift
    set -- --tasks "$tasks" "$@"
    ;;
esac
launch llava_uhd.eval run "$checkpoint" "$@"
