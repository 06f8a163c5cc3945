#!/usr/bin/env bash
# Makes the virtual environment .venv with the packages of requirements.txt and requirements-dev.txt, or brings it up to date.
# Does nothing when it is up to date already. PYTHON=/path/to/python chooses the interpreter (3.11 or newer). COMPILE=0 leaves compiling to
# whoever imports first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

is_recent() { "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

stamp=.venv/requirements.stamp
wanted=$(cat requirements.txt requirements-dev.txt | cksum)
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ]; then
    exit 0
fi

if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=""
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
        if [ -n "$candidate" ] && is_recent "$candidate"; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "environment: needs Python 3.11 or newer, none found. Install one, or name it: PYTHON=/path/to/python $0" >&2
        exit 1
    fi
    echo "environment: making .venv with $("$python" --version)"
    if ! "$python" -m venv --clear .venv; then
        echo "environment: '$python -m venv' failed; on Debian and Ubuntu install the package python3-venv" >&2
        exit 1
    fi
elif ! is_recent .venv/bin/python; then
    echo "environment: .venv holds $(.venv/bin/python --version), but 3.11 or newer is needed; move .venv away and run this again" >&2
    exit 1
fi

echo "environment: installing requirements.txt and requirements-dev.txt into .venv (the first time this downloads several hundred MB or more)"
if ! command -v nvidia-smi >/dev/null 2>&1 && [ -z "${PIP_EXTRA_INDEX_URL:-}" ]; then
    echo "environment: no GPU found; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu would choose a smaller PyTorch without CUDA"
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip # one as old as Python's own takes twice as long to choose
.venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
# pip would compile on one core, and all of it. What cannot be compiled says so when it is imported; what nothing here imports is left out.
if [ "${COMPILE:-1}" != 0 ]; then
    unused='/tests?/|transformers/models/(?!auto/|clip/|t5/)|diffusers/(modular_pipelines|pipelines/(?!flux/))|torch/(testing/_internal|_inductor)/'
    .venv/bin/python -m compileall -q -j 0 -x "$unused|/(pip|mypy|mypyc|setuptools)/" .venv/lib >/dev/null 2>&1 || true
fi
echo "$wanted" >"$stamp"
echo "environment: ready"
