#!/usr/bin/env bash
# Makes the environment if needed and checks what can be told without running anything, fastest first: format, lint, types.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/environment.sh
echo "check: ruff format --check (mends: .venv/bin/ruff format)"
.venv/bin/python -m ruff format --check .
echo "check: ruff check (mends much of it: .venv/bin/ruff check --fix)"
.venv/bin/python -m ruff check .
echo "check: mypy (settings in pyproject.toml)"
.venv/bin/python -m mypy
