#!/usr/bin/env bash
# Train a reference LoRA on whatever there is: CPU, one GPU, all GPUs of this machine, or several machines.
#   bash train.sh configs/pocket.json [--set section.field=value ...] [--resume auto]
# PYTHON (default: .venv/bin/python, else python3) may be set. The other variables, those of torchrun and SLURM among them, and their
# defaults: bash train.sh --help
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [ -z "${PYTHON:-}" ]; then
  if [ -x "$here/.venv/bin/python" ]; then PYTHON="$here/.venv/bin/python"; else PYTHON=python3; fi
fi
exec "$PYTHON" "$here/scripts/launch.py" "$@"
