#!/usr/bin/env bash
# Trains with the Python environment that is active, on one GPU: ./launch_gpu.sh [train.py arguments]
# NUM_PROCESSES=2 ./launch_gpu.sh uses two.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
NUM_PROCESSES=${NUM_PROCESSES:-1}

if command -v nvidia-smi >/dev/null 2>&1; then
  nvidia-smi --query-gpu=index,name,memory.total,memory.free --format=csv || true
else
  echo "no NVIDIA GPU is visible (nvidia-smi is missing); training on what DEVICE finds"
fi
if ! command -v accelerate >/dev/null 2>&1; then
  echo "error: accelerate is not installed in this environment; activate the one with the project's packages" \
    "(source .venv/bin/activate), or use ./uv_train.sh" >&2
  exit 2
fi
exec accelerate launch --num_processes="$NUM_PROCESSES" --num_machines=1 --mixed_precision=no --dynamo_backend=no \
  train.py "$@"
