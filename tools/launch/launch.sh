# Common code of inference.sh, finetune.sh, tests/run.sh and .ci/run, which source this file.
# After use_python, $python is an interpreter that meets the requirements file.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# fail MESSAGE [CODE]
fail() {
    echo "error: $1" >&2
    exit "${2:-1}"
}

# use_python REQUIREMENTS: sets $python to an interpreter that meets REQUIREMENTS. The active Python
# is $PYTHON, or python3 on the PATH if $PYTHON is not set.
use_python() {
    local active=${PYTHON:-}
    [ -n "$active" ] || active=$(command -v python3 || command -v python) ||
        fail "no python3 on the PATH; install Python 3.10 or newer, or set PYTHON to its path"
    "$active" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "$active is not Python 3.10 or newer; activate a newer one, or set PYTHON to its path"
    [[ $active != */* || $active == /* ]] || active=$PWD/$active
    python=$(cd "$repository" && "$active" -m tools.setup_env "$1") || exit
}

# split_arguments ARGUMENTS...: sets ${configs[@]}, the leading arguments that are not flags, and
# ${flags[@]}, the rest. A configuration is looked up in the current folder, then in the repository.
# If neither contains it, its path in the current folder is used. All scripts run in the repository.
# A --base before the configurations is optional.
split_arguments() {
    configs=()
    [ "${1:-}" != --base ] || shift
    while [ $# -gt 0 ] && [[ $1 != -* ]]; do
        if [[ $1 != /* && $PWD != "$repository" ]] && [[ -e $1 || ! -e $repository/$1 ]]; then
            configs+=("$PWD/$1")
        else
            configs+=("$1")
        fi
        shift
    done
    flags=("$@")
    local flag
    for flag in "$@"; do
        if [[ $flag == --base || $flag == --base=* ]]; then
            fail "configurations come before all flags: [CONFIG.yaml ...] [--FLAG ...]" 2
        fi
    done
}

# has_flag WORDS: succeeds if ${flags[@]} contain these words in this order, or joined by =.
has_flag() {
    [[ " ${flags[*]} " == *" $1 "* || " ${flags[*]} " == *" ${1/ /=} "* ]]
}

# show_help SCRIPT: if a flag asks for help, prints the first comment of the launcher and the help
# of the Python script, then exits.
show_help() {
    local flag
    for flag in ${flags[@]+"${flags[@]}"}; do
        if [[ $flag == -h || $flag == --help ]]; then
            sed -n '2,/^set /{/^# /s/^# //p}' "$0"
            echo "Flags (this script sets --base):"
            cd "$repository" && exec "$python" "$1" --help
        fi
    done
}

# visible_gpus: prints the number of GPUs that a program would see. Importing PyTorch to count them
# would take seconds.
visible_gpus() {
    local found named=() name visible=0
    found=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || found=0
    if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
        echo "$found"
        return
    fi
    IFS=, read -ra named <<<"$CUDA_VISIBLE_DEVICES"
    for name in ${named[@]+"${named[@]}"}; do
        [ "$name" != -1 ] || break # CUDA ignores all names after -1
        visible=$((visible + 1))
    done
    echo $((visible < found ? visible : found))
}

# default_processes SCRIPT: prints the number of processes to start if NPROC is not set: one per GPU
# for training, otherwise one.
default_processes() {
    local gpus=1
    if [ "$1" = train_video.py ] && ! has_flag "--device cpu"; then
        gpus=$(visible_gpus)
    fi
    echo $((gpus > 1 ? gpus : 1))
}

# check_number NAME VALUE FROM: fails unless VALUE is a whole number of at least FROM.
check_number() {
    [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ && $2 -ge $3 ]] ||
        fail "$1=$2 is invalid; it must be a whole number of at least $3" 2
}

# meeting_place: sets ${meeting[@]}, the rendezvous arguments of torchrun. The processes meet on
# this machine, or at MASTER_ADDR if NNODES machines run the same command.
meeting_place() {
    local nodes=${NNODES:-1}
    check_number NNODES "$nodes" 1
    meeting=(--standalone)
    [ "$nodes" -gt 1 ] || return 0
    [ -n "${MASTER_ADDR:-}" ] ||
        fail "NNODES=$nodes, but MASTER_ADDR is not set; set it to the first machine's address" 2
    [ -n "${NODE_RANK:-}" ] ||
        fail "NNODES=$nodes, but NODE_RANK is not set; set it to this machine's number, from 0" 2
    check_number NODE_RANK "$NODE_RANK" 0
    [ "$NODE_RANK" -lt "$nodes" ] ||
        fail "NODE_RANK=$NODE_RANK is too large; with NNODES=$nodes it must be below $nodes" 2
    check_number MASTER_PORT "${MASTER_PORT:-29500}" 1
    meeting=(--nnodes "$nodes" --node-rank "$NODE_RANK")
    meeting+=(--master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
}

# run_script SCRIPT: runs SCRIPT with ${configs[@]} and ${flags[@]}, in one process, or with
# torchrun in NPROC processes on each of NNODES machines.
run_script() {
    local processes=${NPROC:-} threads meeting
    [ -n "$processes" ] || processes=$(default_processes "$1")
    check_number NPROC "$processes" 1
    meeting_place
    cd "$repository" || exit
    if [ "$processes ${meeting[0]}" = "1 --standalone" ]; then
        exec "$python" "$1" --base "${configs[@]}" "${flags[@]}"
    fi
    # By default torchrun gives each process one thread and prints a note about it.
    threads=$(($(nproc) / processes))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}
    exec "$python" -m tools.launch.torchrun "${meeting[@]}" --nproc-per-node "$processes" \
        "$1" --base "${configs[@]}" "${flags[@]}"
}
