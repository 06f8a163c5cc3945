"""A loop over commands that can be started again: what is done is passed over, chains of commands run side by side."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from scripts.launching.processes import REQUEUE_EXIT_CODE, send

GRACE_SECONDS = 120.0  # for a training that ends its step and writes a checkpoint


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: For messages.
        command: Program and arguments.
        log: File that gets its output.
        is_done: Whether nothing is left to do; asked before the start and after the end.
        prepare: Called before the start.
        ended: Called with the seconds that it ran, however it ended.
    """

    name: str
    command: Sequence[str]
    log: Path
    is_done: Callable[[], bool]
    prepare: Callable[[], object] = lambda: None
    ended: Callable[[float], object] = lambda seconds: None


def run_chains(
    chains: Sequence[Sequence[Step]], parallel: int, environment: Mapping[str, str], bar: tqdm, refresh: float = 1.0
) -> list[str]:
    """Run chains of steps, `parallel` chains at a time, the steps of a chain in order; a step that is done is passed over.

    A failed step ends its chain only. Any exception here, Ctrl-C among them, ends the commands that run with SIGTERM and waits for them.

    Args:
        chains: What to do.
        parallel: Chains side by side.
        environment: Of the commands.
        bar: Goes on by one with each step that ends well.
        refresh: Seconds between drawings of the bar, also while nothing ends.

    Returns:
        One message per failed step.
    """
    running: set[subprocess.Popen] = set()
    stopped = threading.Event()

    def run(step: Step) -> int:
        """Run a step in a session of its own, its output at the end of its log; returns its exit code."""
        step.prepare()
        step.log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with open(step.log, "ab") as log:
            process = subprocess.Popen(
                step.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=dict(environment), start_new_session=True
            )
        running.add(process)
        if stopped.is_set():  # between the signal to all that run and this line
            process.terminate()
        code = process.wait()
        running.discard(process)
        step.ended(time.monotonic() - start)
        return code

    def run_chain(chain: Sequence[Step]) -> str | None:
        """Run what is left of a chain; returns a message if a step fails."""
        for step in chain:
            if stopped.is_set():
                raise KeyboardInterrupt
            if step.is_done():
                continue
            code = run(step)
            if code == REQUEUE_EXIT_CODE or stopped.is_set():  # a signal reached the command itself, or all
                raise KeyboardInterrupt
            if code or not step.is_done():
                return f"{step.name}: exit code {code}, see {step.log}: {last_line(step.log)}"
            bar.update()
        return None

    with ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(run_chain, chain) for chain in chains]
        waiting = set(futures)
        try:
            while waiting:
                ended, waiting = wait(waiting, refresh, FIRST_EXCEPTION)
                [future.result() for future in ended]  # an interruption comes out here
                bar.refresh()
        except BaseException:
            stopped.set()
            send(list(running), signal.SIGTERM)
            wait(futures, GRACE_SECONDS)
            send(list(running), signal.SIGKILL)
            raise
    return [failure for future in futures if (failure := future.result())]


def last_line(log: Path) -> str:
    """The last line that a log says something in."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()]
    return next((line[-300:] for line in reversed(lines) if line), "no output")


def child_environment(python: str) -> dict[str, str]:
    """The environment of commands: one process and, unless the shell says otherwise, one thread each."""
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "NUM_PROCESSES": "1", "PYTHON": python}
