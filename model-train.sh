#!/bin/sh
# All of a recipe set: sh model-train.sh [SET] [--section.key value ...]
case ${1:--} in -*) set -- uhd_v2/vicuna7b "$@" ;; esac
exec sh "$(dirname -- "$0")/scripts/train.sh" "$@" --evaluate
