#!/usr/bin/env bash
# Trains with the Python environment that is active, on one GPU: ./launch_gpu.sh [ENV_FILE] [train.py arguments]
# NUM_PROCESSES=2 ./launch_gpu.sh uses two.
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/install.sh
NUM_PROCESSES=${NUM_PROCESSES:-1}

take_env_file "$called_from" "$@" && shift "$TAKEN"
if command -v nvidia-smi >/dev/null 2>&1; then
  nvidia-smi --query-gpu=index,name,memory.total,memory.free --format=csv || true
else
  echo "no NVIDIA GPU is visible (nvidia-smi is missing); training on what DEVICE finds"
fi
command -v accelerate >/dev/null 2>&1 || fail "accelerate is not installed in this environment; activate the one with the" \
  "project's packages (source .venv/bin/activate), or use ./uv_train.sh"
if [[ $NUM_PROCESSES == 1 ]]; then
  exec python train.py "$@" # the launcher would turn every exit code into 1
fi
exec accelerate launch --num_processes="$NUM_PROCESSES" --num_machines=1 --mixed_precision=no --dynamo_backend=no \
  train.py "$@"
