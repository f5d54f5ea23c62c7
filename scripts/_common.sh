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

# Refuses a variable that is no whole number.
whole_number() { # NAME VALUE WHAT
    case $2 in "" | *[!0-9]*) fail "$1=$2 is not $3" ;; esac
}

# Prints the first machine of a list as SLURM writes it: node[01-04,7],other is node01.
first_machine() { # LIST
    if command -v scontrol >/dev/null 2>&1; then
        scontrol show hostnames "$1" | head -n 1
    else
        printf '%s\n' "$1" | sed 's/^\([^[,]*\)\[\([^],-]*\)[^]]*\]\([^,]*\).*/\1\2\3/; s/,.*//'
    fi
}

# Sets NNODES, NODE_RANK and MASTER_ADDR from what srun tells each of its tasks, where the user has
# not: one task a machine, the first machine of the list is machine 0.
use_slurm() {
    [ -z "${NNODES:-}" ] && [ -n "${SLURM_JOB_ID:-}" ] || return 0
    nodes=${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}
    [ "$nodes" -gt 1 ] || return 0
    [ -n "${SLURM_STEP_ID:-}" ] ||
        fail "SLURM gave $nodes machines, this is one of them: srun --ntasks-per-node 1 bash ..., or NNODES=1"
    [ "${SLURM_STEP_NUM_TASKS:-${SLURM_NTASKS:-$nodes}}" = "$nodes" ] ||
        fail "srun starts more than one task on a machine, the launcher starts the others: --ntasks-per-node 1"
    NNODES=$nodes
    NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
    MASTER_ADDR=${MASTER_ADDR:-$(first_machine "${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}}")}
}

# Checks NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT: what is wrong there is a wait without end.
check_machines() {
    if [ -n "${NNODES:-}" ]; then
        whole_number NNODES "$NNODES" "a number of machines"
        [ "$NNODES" -ge 1 ] || fail "NNODES=$NNODES is not a number of machines"
    fi
    if [ -n "${MASTER_PORT:-}" ]; then
        whole_number MASTER_PORT "$MASTER_PORT" "the number of a port"
        [ "${#MASTER_PORT}" -le 5 ] && [ "$MASTER_PORT" -ge 1 ] && [ "$MASTER_PORT" -le 65535 ] ||
            fail "MASTER_PORT=$MASTER_PORT is not the number of a port (1 to 65535)"
    fi
    [ "${NNODES:-1}" -gt 1 ] || return 0
    [ -n "${NODE_RANK:-}" ] ||
        fail "NNODES=$NNODES needs NODE_RANK on each machine: 0 on the first to $((NNODES - 1)) on the last"
    whole_number NODE_RANK "$NODE_RANK" "the number of a machine"
    [ "$NODE_RANK" -lt "$NNODES" ] ||
        fail "NODE_RANK=$NODE_RANK: the machines of NNODES=$NNODES are 0 to $((NNODES - 1))"
    [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$NNODES needs MASTER_ADDR, the address of machine 0"
}

# Runs a module in the repository: one process, or torchrun over the GPUs (NPROC) and the machines
# (NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT). With --dry-run the command is printed instead.
launch() { # MODULE [ARGUMENT ...]
    use_slurm
    check_machines
    use_python
    count=$(processes)
    cd "$root"
    if [ "${NNODES:-1}" -gt 1 ]; then
        set -- --nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" \
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
