"""Stopping a run from outside: SIGTERM, SIGUSR1 and Ctrl-C ask for a checkpoint and an exit that a scheduler understands."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Self

REQUEUE_EXIT_CODE = os.EX_TEMPFAIL  # 75: stopped on request with a checkpoint; starting again with --resume auto continues
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class TrainingStopped(Exception):
    """A run that stopped on request, with all steps done so far in a checkpoint.

    Attributes:
        step: Optimizer steps done.
        checkpoint: Folder of the checkpoint.
    """

    def __init__(self, step: int, checkpoint: Path, reason: str) -> None:
        super().__init__(f"stopped by {reason} at step {step}, checkpoint {checkpoint}. Continue with --resume auto.")
        self.step, self.checkpoint = step, checkpoint


class StopSignals:
    """Context in which a stop signal is noted instead of ending the process; a second Ctrl-C ends it at once.

    Attributes:
        received: Name of the first signal, None while there is none.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Take over the signals; in another thread than the main one Python does not allow that, and they keep their effect."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name


def ignore_in_worker(_: int) -> None:
    """For data loading processes: signals that go to a whole group are the training process's to handle."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
