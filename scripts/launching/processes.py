"""Run the processes of one machine: signals go to all of them, the first failure ends all, and one exit code comes back."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

REQUEUE_EXIT_CODE = os.EX_TEMPFAIL  # 75: stopped by a signal with a checkpoint written, to be started again
KILLING_INTERRUPTS = 3  # the second Ctrl-C ends a training process that can still act on it, the third one any
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
POLL_SECONDS = 0.1
GRACE_SECONDS = 15.0  # what the others get after a failure; they may hang in a collective operation


def end_on_signals(code: int = REQUEUE_EXIT_CODE) -> None:
    """Have SIGTERM, SIGUSR1 and Ctrl-C end this process at once with an exit code.

    For a script's first line and its last: while it imports, which takes seconds, and after it has stopped with a checkpoint, a signal
    must not turn into a code that no scheduler starts again, nor an error into one that it does start again. In between the run takes the
    signals over.

    Args:
        code: `REQUEUE_EXIT_CODE`, or what a run has ended with.
    """

    def end(number: int, _: FrameType | None) -> None:
        os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
        os._exit(code)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, end)


def run_processes(command: Sequence[str], environments: Sequence[Mapping[str, str]], grace: float = GRACE_SECONDS) -> int:
    """Run one process per environment and wait for all.

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP are passed on. Each process leads a session of its own, so that a terminal's Ctrl-C or a
    scheduler's signal to the whole group reaches it once, through here. A third SIGINT kills.

    Args:
        command: Program and arguments.
        environments: The whole environment of each process.
        grace: Seconds that the others get to end after one has failed.

    Returns:
        0 where all returned 0; the code of the first failure (128 + n where signal n ended it); else `REQUEUE_EXIT_CODE`.
    """
    children: list[subprocess.Popen] = []
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        send(children, signal.SIGKILL if received.count(signal.SIGINT) >= KILLING_INTERRUPTS else number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        for environment in environments:
            children.append(subprocess.Popen(command, env=dict(environment), start_new_session=True))
        for number in received[:]:  # what came while they were being started
            send(children, number)
        return _wait(children, grace)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def send(children: Sequence[subprocess.Popen], number: int) -> None:
    """Send a signal to those that still run."""
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def _wait(children: Sequence[subprocess.Popen], grace: float) -> int:
    """Exit code of all together; after a failure the others are stopped, and killed after `grace` seconds."""
    failure: int | None = None
    deadline: float | None = None
    while any(child.poll() is None for child in children):
        if failure is None:
            failure = _first_failure(children)
            if failure is not None:
                deadline = time.monotonic() + grace
                send(children, signal.SIGTERM)
        elif deadline is not None and time.monotonic() > deadline:
            print(f"launch: processes that still run {grace:g} s after a failure are killed", file=sys.stderr)
            send(children, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(POLL_SECONDS)
    failure = _first_failure(children) if failure is None else failure
    if failure is not None:
        return failure if failure >= 0 else 128 - failure
    return REQUEUE_EXIT_CODE if any(child.returncode == REQUEUE_EXIT_CODE for child in children) else 0


def _first_failure(children: Sequence[subprocess.Popen]) -> int | None:
    return next((code for child in children if (code := child.poll()) not in (None, 0, REQUEUE_EXIT_CODE)), None)
