"""Iterating a data loader: its processes end with the iteration, whatever ends it, and one that dies is named."""

import multiprocessing
import signal
import threading
from collections.abc import Generator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

FEWER = "fewer such processes (data.num_workers, --workers)"
CAUSES: dict[int, str] = {
    signal.SIGKILL: f", most likely by the system because the machine's memory was full; {FEWER} need less",
    signal.SIGBUS: f", most likely because the shared memory, /dev/shm, was full; give it more (docker run --shm-size=8g), or have {FEWER}",
}


def loaded(loader: DataLoader) -> Generator[Any]:
    """What a loader gives, item by item.

    Raises:
        ChildProcessError: One of its processes was killed, or ended by itself.
    """
    others, before = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
    items = iter(loader)
    if before is not None and threading.current_thread() is threading.main_thread():
        # PyTorch's handler raises wherever this thread happens to be, also half way through an update of the weights. Dead processes are
        # looked for before each item instead, and by PyTorch while it waits for one. An earlier loader may have left the handler here.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if getattr(before, "__module__", "").startswith("torch.") else before)
    workers = sorted(set(multiprocessing.active_children()) - others, key=lambda process: process.pid or 0)
    try:
        while True:
            _require_alive(workers)
            try:
                item = next(items)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError):  # OSError: a killed process no longer hands over what it had announced
                wait([worker.sentinel for worker in workers], timeout=1.0)
                _require_alive(workers)
                raise
            yield item
    finally:
        del items  # where nothing else holds it, PyTorch asks its processes to end
        for worker in workers:  # those that have not, or were not asked; Python would wait for them for ever at its own end
            worker.kill()
            worker.join()


def _require_alive(workers: Sequence[BaseProcess]) -> None:
    """Raise if one of them has ended."""
    for number, worker in enumerate(workers):
        code = worker.exitcode
        if code is None:
            continue
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended by itself with code {code}"
        raise ChildProcessError(f"data loading process {number + 1} of {len(workers)} (pid {worker.pid}) {end}{CAUSES.get(-code, '')}.")
