#!/usr/bin/env bash
# Fine-tune a model: bash finetune.sh [CONFIG.yaml ...] [--FLAG ...]
# Without a configuration: the small bundled model. NPROC=4 trains on 4 processes (GPUs).
# Paths are relative to this folder.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/tools/launch.sh"

split_arguments "$@"
use_python requirements.txt
[ ${#configs[@]} -gt 0 ] || configs=(configs/cogvideox_tiny_sft.yaml)
run_script train_video.py
