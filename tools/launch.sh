# Sourced by inference.sh, finetune.sh, tests/run.sh and .ci/run: what they do alike.
# After use_python, $python is an interpreter that meets the requirements file.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# fail MESSAGE [CODE]
fail() {
    echo "error: $1" >&2
    exit "${2:-1}"
}

# use_python REQUIREMENTS: sets $python; the active Python is $PYTHON, or python3 on the PATH.
use_python() {
    local active=${PYTHON:-}
    [ -n "$active" ] || active=$(command -v python3 || command -v python) ||
        fail "no python3 on the PATH; install Python 3.10 or newer, or name it in PYTHON"
    "$active" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "$active is not a Python of version 3.10 or newer; activate one, or name it in PYTHON"
    [[ $active != */* || $active == /* ]] || active=$PWD/$active
    python=$(cd "$repository" && "$active" -m tools.setup_env "$1") || exit
}

# split_arguments ARGUMENTS...: sets ${configs[@]}, the leading ones that are no flags, and
# ${flags[@]}, the rest. A configuration is looked up where the command was given, then in the
# repository, from which everything runs. A --base before the configurations may stand or not.
split_arguments() {
    configs=()
    [ "${1:-}" != --base ] || shift
    while [ $# -gt 0 ] && [[ $1 != -* ]]; do
        if [[ $1 != /* && $PWD != "$repository" && -e $1 ]]; then
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

# run_script SCRIPT: with ${configs[@]} and ${flags[@]}, in one process or in NPROC of torchrun.
run_script() {
    local processes=${NPROC:-1} threads
    [[ $processes =~ ^[1-9][0-9]*$ ]] ||
        fail "NPROC=$processes: the number of processes must be a whole number from 1" 2
    cd "$repository" || exit
    if [ "$processes" -eq 1 ]; then
        exec "$python" "$1" --base "${configs[@]}" "${flags[@]}"
    fi
    # torchrun would give each process one thread, and say so.
    threads=$(($(nproc) / processes))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}
    exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
        "$1" --base "${configs[@]}" "${flags[@]}"
}
