#!/usr/bin/env bash
# Fine-tune a model: bash finetune.sh [CONFIG.yaml ...] [--FLAG ...]
# Without a configuration: the 2B model where its weights and data are, else the small bundled one.
# NPROC=4 trains on 4 processes (GPUs). Paths are relative to this folder.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/tools/launch.sh"

split_arguments "$@"
use_python requirements.txt
if [ ${#configs[@]} -eq 0 ]; then
    configs=("$(cd "$repository" && "$python" tools/choose_config.py --train "${flags[@]}")")
fi
run_script train_video.py
