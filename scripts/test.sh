#!/usr/bin/env bash
# Makes the environment if needed and runs all tests. Arguments go to pytest: bash scripts/test.sh -k losses
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/environment.sh
# The tests' tensors are tiny: one thread each is fastest, and does not suffer when other programs run.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# The tests' many processes share what one of them has compiled.
export PYTHONDONTWRITEBYTECODE=
# A file's tests share what they set up, so files are dealt out, not tests, in the order of tests/conftest.py. TEST_PROCESSES=0: all in this
# process.
processes="${TEST_PROCESSES:-2}"
echo "test: python -m pytest -n $processes --dist loadfile --no-loadscope-reorder $*"
exec .venv/bin/python -m pytest -n "$processes" --dist loadfile --no-loadscope-reorder "$@"
