"""Losses and gradients that are not finite: the batch is named, and either the run stops or the batch is left out."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from mosaic.data import MosaicBatch
from mosaic.devices import HostCopy
from mosaic.files import write_text

logger = logging.getLogger(__name__)
MOST_IN_A_ROW = 100  # a run that leaves out every batch is broken


class NonFiniteLoss(ValueError):
    """The loss or the gradient of a step is not finite."""


class _Update(NamedTuple):
    """An update in the device's queue: names and numbers, the steps before it, its first global sample index, its micro-batches' ids."""

    names: Sequence[str]
    numbers: HostCopy
    step: int
    first_index: int
    ids: list[list[str]]


class NonFiniteSteps:
    """Looks at a step's numbers when they have come to the host, and decides, alike on all processes, what a bad step means for the run.

    Whether a step changes the adapter is decided on the device (`Updates.apply`), so that the host can prepare the next one meanwhile.

    Attributes:
        values: The terms and the gradient norm of the last step that was looked at, by name.
    """

    def __init__(self, accelerator: Accelerator, file: Path, action: Literal["stop", "skip"]) -> None:
        """Name the file that tells of the last such step.

        Args:
            accelerator: Of the run.
            file: Gets step, terms and ids, as JSON.
            action: `training.non_finite`.
        """
        self.accelerator, self.file, self.action = accelerator, file, action
        self.values: dict[str, float] = {}
        self._in_a_row = 0
        self._update: _Update | None = None

    def note(self, names: Sequence[str], numbers: Tensor, step: int, first_index: int, batches: list[MosaicBatch]) -> None:
        """Have the numbers of an update sent to the host; the one before must have been looked at.

        Args:
            names: Of the numbers.
            numbers: [n], the mean terms over all processes and the norm of the joined gradient, so alike on each.
            step: Optimizer steps done before.
            first_index: Global sample index of the step's first sample.
            batches: This process's micro-batches.
        """
        assert self._update is None
        self._update = _Update(names, HostCopy(numbers), step, first_index, [batch.ids for batch in batches])

    def was_finite(self) -> bool | None:
        """Whether all numbers of the noted update are finite; None: all have been looked at. Waits for them."""
        if self._update is None:
            return None
        self.values = dict(zip(self._update.names, self._update.numbers.values(), strict=True))
        if not all(math.isfinite(value) for value in self.values.values()):
            return False
        self._update, self._in_a_row = None, 0
        return True

    def refuse(self) -> None:
        """Say of a noted update that it was not finite, and has not changed the adapter; to be called on all processes.

        Raises:
            NonFiniteLoss: The run is to stop, or `MOST_IN_A_ROW` steps have been left out in a row.
        """
        assert self._update is not None
        (_, _, step, first_index, own_ids), self._update = self._update, None
        ids = self._ids(own_ids)
        shown = {name: repr(value) for name, value in self.values.items()}  # JSON has no word for nan
        self._write({"step": step + 1, **shown, "first_sample_index": first_index, "ids": ids})
        self._in_a_row += 1
        message = f"step {step + 1}: not finite: {', '.join(f'{name} {value}' for name, value in shown.items())}; ids {', '.join(ids)}"
        if self.action == "stop" or self._in_a_row >= MOST_IN_A_ROW:
            raise NonFiniteLoss(
                f"{message} (saved in {self.file}). The adapter is as it was after step {step}, which is in a checkpoint. Look at these "
                "samples; training.non_finite=skip leaves such batches out."
            )
        logger.warning("%s; this batch is left out", message)

    def _ids(self, own: list[list[str]]) -> list[str]:
        """Ids of the step's samples by global index: micro-batch by micro-batch, process by process."""
        places = [(micro_step, self.accelerator.process_index, ids) for micro_step, ids in enumerate(own)]
        return [name for _, _, names in sorted(gather_object(places)) for name in names]

    def _write(self, record: dict) -> None:
        if not self.accelerator.is_main_process:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.file, json.dumps(record, indent=2) + "\n")
        except OSError as error:
            logger.warning("%s: cannot be written: %s", self.file, error)
