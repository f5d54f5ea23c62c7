#!/bin/sh
exec sh "$(dirname -- "$0")/../../_forward.sh" "$0" "$@"
