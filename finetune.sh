#!/bin/sh
exec sh "$(dirname -- "$0")/scripts/finetune.sh" "$@"
