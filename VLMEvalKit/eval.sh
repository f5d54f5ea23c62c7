#!/bin/sh
# The published command of LLaVA-UHD v2, with the checkpoint as its first word:
#   sh VLMEvalKit/eval.sh CHECKPOINT_DIR [options]
# The checkout of VLMEvalKit is another folder, which the variable VLMEVALKIT names.
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
case ${1:--} in -*) echo "error: which checkpoint? usage: sh VLMEvalKit/eval.sh CHECKPOINT_DIR" >&2; exit 2 ;; esac
checkpoint=$1
shift
exec sh "$root/scripts/vlmevalkit.sh" "$checkpoint" --model llava_uhd2 --verbose \
    --data OCRBench MMMU_DEV_VAL SEEDBench_IMG MMBench_TEST_EN RealWorldQA HRBench4K "$@"
