#!/usr/bin/env bash
# Trains with the Python environment that is active, on one GPU: ./launch_gpu.sh [ENV_FILE] [train.py arguments]
# NUM_PROCESSES=2 ./launch_gpu.sh uses two; ./launch_4gpu.sh is the same with four. scripts/launch.sh has all variables.
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/install.sh
source scripts/launch.sh

take_env_file "$called_from" "$@" && shift "$TAKEN"
show_gpus
command -v accelerate >/dev/null 2>&1 || fail "accelerate is not installed in this environment; activate the one with the" \
  "project's packages (source .venv/bin/activate), or use ./uv_train.sh"
start python train.py "$@"
