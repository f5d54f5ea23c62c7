#!/bin/sh
# Stage 1, the projector learns: bash scripts/pretrain.sh [RECIPE] [--section.key value ...]
# Recipes: names under scripts/recipes, or a YAML file. Paths in a recipe count from the repository.
# Processes: NPROC (default: all visible GPUs); several machines: NNODES NODE_RANK MASTER_ADDR MASTER_PORT.
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/_common.sh"

train uhd_v1/pretrain_vicuna7b "$@"
