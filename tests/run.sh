#!/usr/bin/env bash
# Run the tests: bash tests/run.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../tools/launch/launch.sh"

use_python requirements-dev.txt
cd "$repository"
exec "$python" -m pytest "$@"
