#!/usr/bin/env bash
# Runs a command inside a SLURM job: passes SIGUSR1 (sent before the time limit by --signal=B:USR1@120) and SIGTERM (preemption) on to it,
# and has SLURM start the job again where it ends with code 75: stopped by a signal, with a checkpoint written.
#   bash configs/slurm/requeue.sh COMMAND [ARGUMENT ...]
set -u
child=""
signal=""
forward() {
  signal="$1"
  [ -z "$child" ] || kill -"$signal" "$child" 2>/dev/null || true
}
trap 'forward USR1' USR1
trap 'forward TERM' TERM
"$@" &
child=$!
if [ -n "$signal" ]; then # it came before the command had started
  forward "$signal"
  signal=""
fi
code=127
while true; do
  wait "$child"
  found=$?
  [ "$found" -eq 127 ] || code=$found # 127: its code is known already
  [ -n "$signal" ] || break
  signal="" # it ended the wait, not the command
done
if [ "$code" -eq 75 ]; then
  job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}"
  job="${job:-${SLURM_JOB_ID:?exit code 75 outside of a SLURM job: start the command again}}"
  if scontrol requeue "$job"; then
    echo "requeue: stopped with a checkpoint, job $job is queued again" >&2
  else
    echo "requeue: stopped with a checkpoint, but job $job could not be queued again: submit it once more" >&2
  fi
fi
exit "$code"
