#!/bin/sh
# Installs llava_uhd: sh install.sh [--cpu|--cuda] [--extras train,serve,eval,dev]
#
# Where: the active virtual or conda environment, else .venv in the repository (made if needed).
# torch comes first and alone, and is never replaced afterwards: without an NVIDIA GPU, or with
# --cpu, only a CPU build is accepted, so no CUDA package is ever downloaded.
# A second run with nothing new to install ends at once.
# Environment: PYTHON (interpreter for .venv), TORCH_VERSION (default below).
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
. "$root/scripts/_common.sh"

torch_version=${TORCH_VERSION:-2.13.0}
cpu_wheels=https://download.pytorch.org/whl/cpu # public, documented on pytorch.org
usage="usage: sh install.sh [--cpu|--cuda] [--extras name,name]"

say() { printf 'install: %s\n' "$*"; }

device=
extras=
while [ $# -gt 0 ]; do
    case $1 in
    --cpu) device=cpu ;;
    --cuda) device=cuda ;;
    --extras) [ $# -gt 1 ] || fail "--extras needs a list; $usage"; shift; extras=$1 ;;
    --extras=*) extras=${1#--extras=} ;;
    -h | --help) printf '%s\n' "$usage"; exit 0 ;;
    *) fail "unknown argument '$1'; $usage" ;;
    esac
    shift
done
case $extras in *[!a-z,]*) fail "--extras '$extras': names separated by commas, as in pyproject.toml" ;; esac
for name in $(printf '%s' "$extras" | tr ',' ' '); do
    grep -q "^$name = \[" "$root/pyproject.toml" || fail "unknown extra '$name'; pyproject.toml lists them"
done

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

environment=$(active_environment)
if [ -n "$environment" ]; then
    new_enough "$environment/bin/python" || fail "the active environment $environment has a Python older than 3.10; leave it, or activate another"
else
    environment=$root/.venv
fi
python=$environment/bin/python

# The stamp: what was installed from which pyproject.toml, device, then the extras so far.
stamp=$environment/.llava_uhd_install
key="$root $(cat "$root/pyproject.toml" "$root/install.sh" | cksum)"
have=,
if [ -f "$stamp" ] && [ "$(sed -n 1p "$stamp")" = "$key" ] && [ -x "$python" ]; then
    have=$(sed -n 3p "$stamp")
    missing=
    for name in $(printf '%s' "$extras" | tr ',' ' '); do
        case $have in *",$name,"*) ;; *) missing=$name ;; esac
    done
    if [ -z "$missing" ] && { [ -z "$device" ] || [ "$device" = "$(sed -n 2p "$stamp")" ]; }; then
        say "nothing to do in $environment"
        exit 0
    fi
fi

if [ -z "$device" ]; then
    device=cpu
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then device=cuda; fi
fi

if [ "$environment" = "$root/.venv" ] && ! "$python" -m pip --version >/dev/null 2>&1; then
    base=
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if new_enough "$candidate"; then base=$candidate; break; fi
    done
    [ -n "$base" ] || fail "no Python 3.10 or newer found (tried ${PYTHON:-python3, python3.10 to 3.13}); install one, or name it: PYTHON=/path/to/python3 sh install.sh"
    say "making .venv with $("$base" --version)"
    "$base" -m venv --clear "$environment" ||
        fail "cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" 1
fi
"$python" -m pip --version >/dev/null 2>&1 || fail "$environment has no pip; add it, or leave the environment"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
pip_install() { "$python" -m pip install -qq "$@"; }

install_torch() {
    if [ "$device" = cuda ]; then
        say "installing torch $torch_version with CUDA (gigabytes)"
        pip_install "torch==$torch_version"
    elif [ "$(uname -s)" = Darwin ]; then
        say "installing torch $torch_version"
        pip_install "torch==$torch_version"
    else
        # The label +cpu exists only on CPU builds, whatever source answers.
        say "installing torch $torch_version, CPU build (about 200 MB)"
        pip_install "torch==$torch_version+cpu" 2>"$work/log" && return
        say "not among the configured package sources; trying $cpu_wheels"
        pip_install "torch==$torch_version+cpu" --extra-index-url "$cpu_wheels"
    fi
}

if ! "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; then
    install_torch || fail "torch $torch_version could not be installed (pip's reason is above); install torch yourself in $environment and run this again, or set TORCH_VERSION" 1
fi
found=$("$python" -c 'import importlib.metadata as m, torch
print(m.version("torch"), torch.version.cuda or torch.version.hip or "none")') ||
    fail "the torch in $environment does not import (reason above); reinstall it" 1
accelerator=${found#* }
found=${found% *}
say "torch $found, CUDA: $accelerator"
if [ "$device" = cuda ] && [ "$accelerator" = none ]; then
    fail "a CUDA build was asked for, but $environment has torch $found; remove it (pip uninstall torch), then run this again" 1
fi

printf 'torch==%s\n' "$found" >"$work/constraints" # what follows must not replace it
say "installing llava_uhd${extras:+ with $extras} into $environment (a minute or two)"
pip_install --constraint "$work/constraints" --editable "$root${extras:+[$extras]}" ||
    fail "pip could not install llava_uhd (its reason is above)" 1

for name in $(printf '%s' "$extras" | tr ',' ' '); do
    case $have in *",$name,"*) ;; *) have=$have$name, ;; esac
done
printf '%s\n%s\n%s\n' "$key" "$device" "$have" >"$stamp"
say "done"
[ -n "$(active_environment)" ] || say "activate it with: . $environment/bin/activate"
