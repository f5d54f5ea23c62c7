#!/bin/sh
# Pre-trains the upsampler (VDIM) of LLaVA-UHD v2: bash scripts/vdim_pretrain.sh [RECIPE] [--section.key value ...]
# Recipes: names under scripts/recipes/vdim, or a YAML file. Paths in a recipe count from the repository.
# Processes: NPROC (default: all visible GPUs); several machines: NNODES NODE_RANK MASTER_ADDR MASTER_PORT.
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/_common.sh"

recipe=vdim/better
case ${1:--} in -*) ;; *)
    recipe=$(absolute "$1")
    shift
    ;;
esac
launch llava_uhd.train.vdim "$recipe" "$@"
