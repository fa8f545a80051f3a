#!/usr/bin/env bash
# Make videos from prompts: bash inference.sh [CONFIG.yaml ...] [--FLAG ...]
# Without a configuration, this uses the 2B model if its weights exist, and otherwise the small
# bundled model. NPROC=4 splits the prompts over 4 processes (one GPU each). Paths are relative to
# this folder.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/tools/launch/launch.sh"

split_arguments "$@"
use_python requirements.txt
show_help sample_video.py
if [ ${#configs[@]} -eq 0 ]; then
    choice=$(cd "$repository" && "$python" tools/launch/choose_config.py "${flags[@]}") || exit
    configs=("$choice")
fi
run_script sample_video.py
