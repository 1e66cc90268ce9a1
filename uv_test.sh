#!/usr/bin/env bash
# The other command: installs what the tests need and runs them all (ruff, then pytest). Arguments go to pytest.
# Two workers run the files (TEST_WORKERS=0: none, in this process), each with one thread: the toy models are too small to
# share cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/install.sh

install_project --group test
.venv/bin/ruff format --check .
.venv/bin/ruff check .
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest --numprocesses "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
