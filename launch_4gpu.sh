#!/usr/bin/env bash
# Trains with the Python environment that is active, on four GPUs: ./launch_4gpu.sh [ENV_FILE] [train.py arguments]
# NUM_PROCESSES=8 ./launch_4gpu.sh uses eight. FSDP, several machines: scripts/launch.sh and configs/ say which variables.
set -euo pipefail
export NUM_PROCESSES=${NUM_PROCESSES:-4}
exec "$(dirname "${BASH_SOURCE[0]}")/launch_gpu.sh" "$@"
