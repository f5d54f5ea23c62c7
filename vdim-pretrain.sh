#!/bin/sh
exec sh "$(dirname -- "$0")/scripts/vdim_pretrain.sh" "$@"
