#!/bin/sh
# Installs what the tests need, then runs them: bash scripts/test.sh [--full] [pytest arguments]
# --full adds the tests that take minutes.
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/_common.sh"

sh "$root/install.sh" --extras dev,train,quickstart
use_python
cd "$root"
if [ "${1:-}" = --full ]; then
    shift
    set -- -m "" "$@"
fi
exec "$python" -m pytest "$@"
