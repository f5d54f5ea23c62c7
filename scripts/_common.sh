# Sourced by install.sh and the scripts of this folder. POSIX sh; expects $root, the repository.

fail() { # MESSAGE [STATUS]
    printf 'error: %s\n' "$1" >&2
    exit "${2:-2}"
}

# Prints the folder of the active environment, or nothing. conda's "base" does not count: conda
# activates it in every shell, so nobody chose it.
active_environment() {
    if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
        printf '%s\n' "$VIRTUAL_ENV"
    elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" != base ] &&
        [ -x "$CONDA_PREFIX/bin/python" ]; then
        printf '%s\n' "$CONDA_PREFIX"
    fi
}

# Sets $python: the active environment, else .venv, else python3; the first that has the packages.
use_python() {
    for python in "$(active_environment)/bin/python" "$root/.venv/bin/python" "$(command -v python3)"; do
        [ -x "$python" ] || continue
        "$python" -c 'import importlib.util as u, sys
sys.exit(any(u.find_spec(name) is None for name in ("torch", "transformers", "safetensors")))' &&
            return
    done
    fail "llava_uhd is not installed here; run: bash install.sh"
}

# Prints a path that exists as an absolute one, anything else (a name) as it is: the commands run
# in the repository, the user may stand elsewhere.
absolute() { # WORD
    case $1 in
    /*) printf '%s\n' "$1" ;;
    *) if [ -e "$1" ]; then printf '%s/%s\n' "$PWD" "$1"; else printf '%s\n' "$1"; fi ;;
    esac
}

# Processes of this machine: NPROC, else the GPUs that torch sees, else 1.
processes() {
    if [ -n "${NPROC:-}" ]; then
        case $NPROC in *[!0-9]* | 0) fail "NPROC=$NPROC is not a number of processes" ;; esac
        printf '%s\n' "$NPROC"
    elif command -v nvidia-smi >/dev/null 2>&1; then
        "$python" -c 'import torch; print(max(1, torch.cuda.device_count()))'
    else
        echo 1
    fi
}

# Prints a word as a shell reads it.
quoted() { # WORD
    case $1 in
    "" | *[!A-Za-z0-9_./:=,@%+-]*) printf "'%s'\n" "$(printf '%s\n' "$1" | sed "s/'/'\\\\''/g")" ;;
    *) printf '%s\n' "$1" ;;
    esac
}

# Becomes a command, or only prints it, if one of its words is --dry-run.
become() { # COMMAND [ARGUMENT ...]
    line="cd $(quoted "$root") &&"
    dry=
    for word; do
        if [ "$word" = --dry-run ]; then dry=1; else line="$line $(quoted "$word")"; fi
    done
    [ -n "$dry" ] || exec "$@"
    printf '%s\n' "$line"
}

# Runs a module in the repository: one process, or torchrun over the GPUs (NPROC) and the machines
# (NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT). With --dry-run the command is printed instead.
launch() { # MODULE [ARGUMENT ...]
    use_python
    count=$(processes)
    cd "$root"
    if [ "${NNODES:-1}" -gt 1 ]; then
        [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$NNODES needs MASTER_ADDR, the address of machine 0"
        set -- --nnodes "$NNODES" --node_rank "${NODE_RANK:-0}" --master_addr "$MASTER_ADDR" \
            --master_port "${MASTER_PORT:-29500}" --nproc_per_node "$count" -m "$@"
    elif [ "$count" -gt 1 ] && [ -n "${MASTER_PORT:-}" ]; then
        set -- --master_port "$MASTER_PORT" --nproc_per_node "$count" -m "$@"
    elif [ "$count" -gt 1 ]; then
        set -- --standalone --nproc_per_node "$count" -m "$@"
    else
        become "$python" -m "$@"
        return
    fi
    become "$python" -m llava_uhd.launch "$@"
}

# Trains a recipe: the first word, unless it is an option, replaces the default.
train() { # DEFAULT_RECIPE [RECIPE] [--section.key value ...]
    recipe=$1
    shift
    case ${1:--} in -*) ;; *)
        recipe=$(absolute "$1")
        shift
        ;;
    esac
    launch llava_uhd.train "$recipe" "$@"
}
