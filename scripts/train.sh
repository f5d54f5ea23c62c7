#!/bin/sh
# Pretrains, finetunes and evaluates in a row: bash scripts/train.sh [SET] [--evaluate [TASKS]] [--dry-run] [--section.key value ...]
# SET: uhd_v2/vicuna7b stands for the recipes uhd_v2/pretrain_vicuna7b and uhd_v2/finetune_vicuna7b,
# onevision/qwen2_7b for the four stages of LLaVA-OneVision.
# llavolta/4stage, llavolta/heavy-compression, ...: LLaVolta.
# Options go to all stages, --pretrain.OPTION, --finetune.OPTION and --evaluate.OPTION to one step.
# What is finished is not done again: after an interruption repeat the command. --dry-run prints the commands.
# Processes: as for pretrain.sh.
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/_common.sh"

set=uhd_v2/vicuna7b
case ${1:--} in -*) ;; *)
    set=$1
    shift
    ;;
esac
use_python
cd "$root"
exec "$python" -m llava_uhd.train.sequence "$set" "$@"
