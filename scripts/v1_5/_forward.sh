#!/bin/sh
# What the published commands of LLaVolta run here. They call this with their own path and options:
#   train-SCHEME.sh           scripts/train.sh llavolta/SCHEME
#   eval/SCHEME/TASK.sh       scripts/eval.sh CHECKPOINT TASK, compressed as the scheme is at inference
# --dry-run prints the commands; other options go on to them. Environment, all optional:
#   NAME          of the checkpoint, llava-v1.5-7b-NAME; default: the scheme
#   ROOT_DATA     holds LLaVA-Pretrain, LLaVA-Tuning and eval; default: as in the recipes
#   ROOT_WEIGHT   checkpoints are written and looked for there; default: checkpoints
#   ROOT_LOG      what is shown is also added to a file there
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/../.." && pwd)
. "$root/scripts/_common.sh"

# The path of a folder that may not exist yet, from where the user stands.
place() { # PATH
    case $1 in /*) printf '%s\n' "${1%/}" ;; *) printf '%s/%s\n' "$PWD" "${1%/}" ;; esac
}

# Runs a command; what it shows also goes to a file. The status is the command's.
logged() { # FILE COMMAND [ARGUMENT ...]
    log=$1
    shift
    mkdir -p "$(dirname -- "$log")" || fail "ROOT_LOG $ROOT_LOG cannot be made"
    exec 4>&1
    status=$({ { ended=0; "$@" 2>&1 3>&- 4>&- || ended=$?; echo "$ended" >&3; } | tee -a "$log" >&4; } 3>&1)
    exit "$status"
}

called=$1
shift
file=$(basename -- "$called" .sh)
case $file in
train-*) scheme=${file#train-} ;;
*) scheme=$(basename -- "$(CDPATH= cd -- "$(dirname -- "$called")" && pwd)" | tr _ -) ;;
esac
# Folders of checkpoints are written with -, recipes and folders of scripts with _: take both.
name=${NAME:-$scheme}
case $name in */*) fail "NAME=$name is a path: it is a name, and ROOT_WEIGHT the folder" ;; esac
[ "$(printf '%s\n' "$name" | tr _ -)" != "$scheme" ] || name=$scheme
weights=$(place "${ROOT_WEIGHT:-$root/checkpoints}")
[ -z "${ROOT_DATA:-}" ] || ROOT_DATA=$(place "$ROOT_DATA")

if [ "$file" = "train-$scheme" ]; then
    other=$(printf '%s\n' "$name" | tr _ -)
    if [ "$name" != "$scheme" ] && [ -e "$root/scripts/v1_5/train-$other.sh" ]; then
        fail "NAME=$name is another scheme: bash scripts/v1_5/train-$other.sh trains it; or leave NAME out"
    fi
    if [ -n "${ROOT_WEIGHT:-}" ] || [ "$name" != "$scheme" ]; then
        set -- --pretrain.output_dir "$weights/llava-v1.5-7b-pretrain-$name" \
            --finetune.output_dir "$weights/llava-v1.5-7b-$name" "$@"
    fi
    if [ -n "${ROOT_DATA:-}" ]; then
        set -- --pretrain.data.path "$ROOT_DATA/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json" \
            --pretrain.data.image_folder "$ROOT_DATA/LLaVA-Pretrain/images" \
            --finetune.data.path "$ROOT_DATA/LLaVA-Tuning/llava_v1_5_mix665k.json" \
            --finetune.data.image_folder "$ROOT_DATA/LLaVA-Tuning" "$@"
    fi
    log=train-$name.log
    set -- sh "$root/scripts/train.sh" "llavolta/$scheme" "$@"
else
    [ -z "${ROOT_DATA:-}" ] || set -- --data-root "$ROOT_DATA/eval" "$@"
    published="--compression.method avgpool1d --compression.remainder drop --compression.positions half"
    case $scheme in
    heavy-compression) set -- $published --compression.layer 2 --compression.stride 8 "$@" ;;
    light-compression) set -- $published --compression.layer 16 --compression.stride 8 "$@" ;;
    *) case " $*" in *" --compression."*) ;; *) set -- --compression.method none "$@" ;; esac ;;
    esac
    checkpoint=$weights/llava-v1.5-7b-$name
    for spelled in "$(printf '%s\n' "$name" | tr _ -)" "$(printf '%s\n' "$name" | tr - _)"; do
        [ -e "$checkpoint" ] || [ ! -e "$weights/llava-v1.5-7b-$spelled" ] ||
            checkpoint=$weights/llava-v1.5-7b-$spelled
    done
    log=$name-$file.log
    set -- sh "$root/scripts/eval.sh" "$checkpoint" "$file" "$@"
fi
case " $* " in *" --dry-run "*) exec "$@" ;; esac
[ -z "${ROOT_LOG:-}" ] || logged "$(place "$ROOT_LOG")/$log" "$@"
exec "$@"
