"""Loaders whose processes die, or are left in the middle; `tests/training/test_stopping.py` has those of training."""

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from mosaic.data.workers import loaded


class Numbers(Dataset[int]):
    """0 to 99; at 20 something happens to the process that reads it."""

    def __init__(self, end: Any = None) -> None:
        self.end = end

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        if index == 20 and self.end is not None:
            os._exit(self.end) if self.end >= 0 else os.kill(os.getpid(), -self.end)
        return index


def slowly(items: Iterator[int]) -> Iterator[int]:
    """So that the death is seen before an item; while it waits for one, PyTorch looks every five seconds only."""
    for item in items:
        yield item
        time.sleep(0.03)


def children() -> set[Any]:
    return set(multiprocessing.active_children())


@pytest.fixture(autouse=True)
def pytorch_handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """That of an earlier loader, which raises wherever this process happens to be."""
    kept = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
    list(DataLoader(Numbers(), batch_size=None, num_workers=1))
    assert signal.getsignal(signal.SIGCHLD).__module__.startswith("torch.")
    yield
    signal.signal(signal.SIGCHLD, kept)


@pytest.mark.parametrize("workers", [0, 2])
def test_all_items_come_in_order(workers: int) -> None:
    before = children()
    assert list(loaded(DataLoader(Numbers(), batch_size=None, num_workers=workers))) == list(range(100))
    assert children() == before
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (-signal.SIGKILL, r"process 1 of 2 \(pid \d+\) was killed by SIGKILL, most likely by the system .*data\.num_workers"),
        (-signal.SIGBUS, r"process 1 of 2 \(pid \d+\) was killed by SIGBUS, most likely because the shared memory"),
        (3, r"process 1 of 2 \(pid \d+\) ended by itself with code 3\."),
    ],
)
def test_a_process_that_dies_is_named(end: int, message: str) -> None:
    before = children()
    found: list[int] = []
    with pytest.raises(ChildProcessError, match=message):
        found.extend(slowly(loaded(DataLoader(Numbers(end), batch_size=None, num_workers=2))))
    assert found == list(range(len(found)))
    assert len(found) <= 20
    assert children() == before


def test_no_process_stays_where_the_reader_stops_or_fails() -> None:
    before = children()
    with closing(loaded(DataLoader(Numbers(), batch_size=None, num_workers=2))) as items:
        assert next(items) == 0
        assert len(children() - before) == 2
    assert children() == before
    kept = []
    try:
        for _ in loaded(DataLoader(Numbers(), batch_size=None, num_workers=2)):
            raise OSError("the disk is full")
    except OSError as error:
        kept.append(error)  # and with it the frames
    kept.clear()
    gc.collect()
    assert children() == before
