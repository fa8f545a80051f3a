#!/usr/bin/env bash
# Fine-tune a model: bash finetune.sh [CONFIG.yaml ...] [--FLAG ...]
# Without a configuration, this trains the 2B model if its weights and data exist. Otherwise it
# teaches the small bundled model a new word. Training uses all visible GPUs, or NPROC processes.
# For several machines, set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, as for torchrun.
# Paths are relative to this folder.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/tools/launch/launch.sh"

split_arguments "$@"
use_python requirements.txt
show_help train_video.py
if [ ${#configs[@]} -eq 0 ]; then
    choice=$(cd "$repository" && "$python" tools/launch/choose_config.py --train "${flags[@]}") ||
        exit
    if [ "$choice" = configs/cogvideox_tiny_lesson.yaml ]; then
        [ "${NPROC:-1}" = 1 ] || echo "NPROC is ignored: this training uses one process" >&2
        cd "$repository"
        exec "$python" tools/teach_tiny.py "${flags[@]}"
    fi
    configs=("$choice")
fi
run_script train_video.py
