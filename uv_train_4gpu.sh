#!/usr/bin/env bash
# Installs what is missing, then trains on four GPUs: ./uv_train_4gpu.sh [ENV_FILE] [train.py arguments]
# Everything as for uv_train.sh (--check too); NUM_PROCESSES=8 ./uv_train_4gpu.sh uses eight.
set -euo pipefail
export NUM_PROCESSES=${NUM_PROCESSES:-4}
exec "$(dirname "${BASH_SOURCE[0]}")/uv_train.sh" "$@"
