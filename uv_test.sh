#!/usr/bin/env bash
# The other command: installs what the tests need and runs them all (ruff, then pytest). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/install.sh

install_project --group test
.venv/bin/ruff format --check .
.venv/bin/ruff check .
exec .venv/bin/python -m pytest "$@"
