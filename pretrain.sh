#!/bin/sh
exec sh "$(dirname -- "$0")/scripts/pretrain.sh" "$@"
