"""Commands in chains, some chains side by side, with one progress bar over all of their work."""

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from scripts.processes import REQUEUE_EXIT_CODE, send

POLL_SECONDS = 0.5
GRACE_SECONDS = 120.0  # for a training that ends its step and writes a checkpoint


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: For messages.
        command: Program and arguments.
        log: File that gets its output.
        cost: Work, in any unit that all jobs share.
        is_done: Whether nothing is left to do; asked before the start and after the end.
        progress: Share of it that is done, 0 to 1.
        prepare: Called before the start.
        ended: Called with the seconds that it ran, however it ended.
    """

    name: str
    command: Sequence[str]
    log: Path
    cost: float
    is_done: Callable[[], bool]
    progress: Callable[[], float]
    prepare: Callable[[], None]
    ended: Callable[[float], None]


@dataclass
class _Running:
    chain: Iterator[Job]
    job: Job
    process: subprocess.Popen
    start: float
    counted: float


def run_chains(
    chains: Sequence[Sequence[Job]], parallel: int, environment: Mapping[str, str], bar: tqdm, refresh: float = 1.0
) -> list[str]:
    """Run chains of jobs, `parallel` chains at a time, the jobs of a chain in order; a job that is done is passed over.

    A failed job ends its chain only. Any exception here, Ctrl-C among them, ends the jobs that run with SIGTERM and waits for them.

    Returns:
        One message per failed job.
    """
    waiting, running, failures, shown = [iter(chain) for chain in chains], [], [], -math.inf
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                started = _start(waiting.pop(0), environment)
                running += [started] if started else []
            if running:
                time.sleep(POLL_SECONDS)
            if time.monotonic() - shown >= refresh:  # also while nothing is counted, so that the time left goes on
                bar.refresh()
                shown = time.monotonic()
            for entry in running[:]:
                code = entry.process.poll()
                _count(entry, 1.0 if code == 0 else entry.job.progress(), bar)
                if code is None:
                    continue
                running.remove(entry)
                entry.job.ended(time.monotonic() - entry.start)
                if code == 0 and entry.job.is_done():
                    waiting.insert(0, entry.chain)
                elif code == REQUEUE_EXIT_CODE:
                    raise KeyboardInterrupt  # a signal reached the job itself
                else:
                    failures.append(f"{entry.job.name}: exit code {code}, see {entry.job.log}: {last_line(entry.job.log)}")
    finally:
        _stop(running)
    return failures


def remaining_cost(chains: Sequence[Sequence[Job]]) -> float:
    """Work of the jobs that are not done, less what they have done."""
    return sum(job.cost * (1 - min(job.progress(), 1.0)) for chain in chains for job in chain if not job.is_done())


def _start(chain: Iterator[Job], environment: Mapping[str, str]) -> _Running | None:
    """Start the first job of a chain that is not done; None: all are."""
    for job in chain:
        if job.is_done():
            continue
        job.prepare()
        job.log.parent.mkdir(parents=True, exist_ok=True)
        begun = job.progress()
        with open(job.log, "ab") as log:
            process = subprocess.Popen(
                job.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=dict(environment), start_new_session=True
            )
        return _Running(chain, job, process, time.monotonic(), begun)
    return None


def _count(entry: _Running, progress: float, bar: tqdm) -> None:
    if progress > entry.counted:
        bar.update(entry.job.cost * (progress - entry.counted))
        entry.counted = progress


def _stop(running: Sequence[_Running]) -> None:
    """End what still runs; whoever does not end in time is killed."""
    processes = [entry.process for entry in running]
    send(processes, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for entry in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            entry.process.wait(max(deadline - time.monotonic(), 0.1))
        if entry.process.poll() is None:
            entry.process.kill()
            entry.process.wait()
        entry.job.ended(time.monotonic() - entry.start)


def last_line(log: Path) -> str:
    """The last line that a log says something in."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()]
    return next((line[-300:] for line in reversed(lines) if line), "no output")


def child_environment(parallel: int, python: str) -> dict[str, str]:
    """The environment of jobs: the cores shared out as threads, one process each."""
    threads = max(1, (os.cpu_count() or 1) // parallel)
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), "NUM_PROCESSES": "1", "PYTHON": python}
