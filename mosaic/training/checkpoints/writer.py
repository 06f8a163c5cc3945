"""Checkpoints written in the background: training waits for the copy to the host only."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from mosaic.config.sections import TrainingConfig
from mosaic.training.checkpoints.checkpoint import Snapshot, rotate, write_checkpoint

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes one snapshot at a time; the next one, and the end of a run, wait for the one before."""

    def __init__(self, folder: Path, training: TrainingConfig, best_of: Callable[[list[int]], int | None]) -> None:
        """Name the folder.

        Args:
            folder: Where checkpoints live.
            training: Which checkpoints stay: `keep_checkpoints` and `milestone_every`.
            best_of: The best of some steps, whose checkpoint stays; or None.
        """
        self.folder, self.training, self.best_of = folder, training, best_of
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Finish what is being written, also where the run ends by an error."""
        self._executor.shutdown(wait=True)
        if self.failed and self._pending is not None:
            logger.error("%s", self._pending.exception())

    def submit(self, snapshot: Snapshot) -> None:
        """Start writing a snapshot. Raises what the one before has raised."""
        self.wait()
        self._pending = self._executor.submit(self._write, snapshot)

    @property
    def failed(self) -> bool:
        """Whether the last snapshot could not be written; `wait` then raises why."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Wait until the last snapshot is on the disk.

        Raises:
            OSError: It could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, snapshot: Snapshot) -> None:
        write_checkpoint(self.folder, snapshot)
        try:
            rotate(self.folder, snapshot.step, self.training.keep_checkpoints, self.training.milestone_every, self.best_of)
        except OSError as error:
            logger.warning("%s: old checkpoints could not be removed: %s", self.folder, error)
