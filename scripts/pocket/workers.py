"""Processes that draw pictures beside the one that wants them."""

import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor


def drawing_processes(count: int) -> ProcessPoolExecutor:
    """A pool that Ctrl-C, which reaches a whole group of processes, does not end: the process that wants the pictures does.

    A `multiprocessing.Pool` would wait for ever for what a process was to draw that the system has killed.
    """
    quiet = (signal.SIGINT, signal.SIG_IGN)
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=signal.signal, initargs=quiet)
