#!/bin/sh
exec sh "$(dirname -- "$0")/scripts/eval.sh" "$@"
