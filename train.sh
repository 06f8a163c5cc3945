#!/usr/bin/env bash
# Train a reference LoRA on whatever there is: CPU, one GPU, or all GPUs of this machine.
#   bash train.sh configs/pocket.json [--set section.field=value ...] [--resume auto]
# NUM_PROCESSES (default: the number of GPUs, at least 1; on a CPU, processes of one thread each) and PYTHON (default:
# .venv/bin/python, else python3) may be set.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [ $# -eq 0 ]; then
  echo "usage: bash train.sh CONFIG [--set section.field=value ...] [--resume auto|FOLDER] [--dry-run]" >&2
  exit 2
fi
if [ -z "${PYTHON:-}" ]; then
  if [ -x "$here/.venv/bin/python" ]; then PYTHON="$here/.venv/bin/python"; else PYTHON=python3; fi
fi
NUM_GPUS="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
if [ "$NUM_GPUS" -eq 0 ]; then
  # On a CPU: keep freed memory, since fresh pages for large tensors cost several percent of a step (glibc; others ignore this).
  export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-8589934592}"
fi
NUM_PROCESSES="${NUM_PROCESSES:-$(( NUM_GPUS > 0 ? NUM_GPUS : 1 ))}"
if [ "$NUM_GPUS" -eq 0 ] && [ "$NUM_PROCESSES" -gt 1 ]; then
  # Several processes on one CPU: accelerate launches those through MPI only, so PyTorch's own launcher starts them.
  export ACCELERATE_USE_CPU=true OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NUM_PROCESSES" "$here/scripts/train.py" "$@"
fi
DEVICE_FLAGS=()
if [ "$NUM_GPUS" -eq 0 ]; then DEVICE_FLAGS+=(--cpu); fi
if [ "$NUM_PROCESSES" -gt 1 ] && [ "$NUM_GPUS" -gt 0 ]; then DEVICE_FLAGS+=(--multi_gpu); fi
exec "$PYTHON" -m accelerate.commands.launch --quiet \
  --num_machines 1 --num_processes "$NUM_PROCESSES" --mixed_precision no --dynamo_backend no "${DEVICE_FLAGS[@]}" \
  "$here/scripts/train.py" "$@"
