#!/bin/sh
# From nothing to a trained model that you can chat with, on embedded data:
#   bash scripts/quickstart.sh [uhd_v1|uhd_v2] [--compare] [--short] [--output-dir DIR]
# --compare also trains the two control arms; --short shows every step with few training steps.
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/_common.sh"

sh "$root/install.sh" --extras train,quickstart
use_python
cd "$root"
exec "$python" -m llava_uhd.quickstart "$@"
