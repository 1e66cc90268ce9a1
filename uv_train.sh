#!/usr/bin/env bash
# The one command: installs what is missing, then trains as the settings file says.
#
#   ./uv_train.sh .env.demo        teaches the embedded model a voice and lets it speak, on CPU, offline, in minutes
#   ./uv_train.sh .env.overfit     shows that the training is right: 24 clips learnt by heart, their codes given back
#   ./uv_train.sh                  your own run, as .env says
#   ./uv_train.sh --check          the preflight of that run instead (test_setup.py); a settings file may follow
#
# Further arguments go to train.py; settings in the environment are stronger than the file: BATCH_SIZE=4 ./uv_train.sh
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/install.sh
source scripts/launch.sh

script=train.py
if [[ ${1:-} == --check ]]; then
  script=test_setup.py
  shift
fi
take_env_file "$called_from" "$@" && shift "$TAKEN"
if [[ -z ${ENV_FILE:-} && ! -f .env && $# -eq 0 ]]; then
  fail "there is no .env here; copy .env.training.example to .env and edit it, or try ./uv_train.sh .env.demo"
fi

install_project $(extras_for_settings)
if ((NUM_PROCESSES > 1)); then
  show_gpus
fi
start .venv/bin/python "$script" "$@"
