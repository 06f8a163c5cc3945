"""Losses and gradients that are not finite: the batch is named, and either the run stops or the batch is left out."""

import json
import logging
import math
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from mosaic.data import MosaicBatch
from mosaic.files import write_text
from mosaic.method.losses import MosaicLoss

logger = logging.getLogger(__name__)
MOST_IN_A_ROW = 100  # a run that leaves out every batch is broken


class NonFiniteLoss(ValueError):
    """The loss or the gradient of a step is not finite."""


class NonFiniteSteps:
    """Decides, alike on all processes, whether a step may change the adapter."""

    def __init__(self, accelerator: Accelerator, file: Path, action: Literal["stop", "skip"]) -> None:
        """Name the file that tells of the last such step.

        Args:
            accelerator: Of the run.
            file: Gets step, terms and ids, as JSON.
            action: `training.non_finite`.
        """
        self.accelerator, self.file, self.action = accelerator, file, action
        self._in_a_row = 0

    def accept(self, loss: MosaicLoss, norm: Tensor, step: int, first_index: int, batches: list[MosaicBatch]) -> bool:
        """Whether all is finite; if not and batches are left out, says so.

        Args:
            loss: Mean terms over all processes, so alike on each.
            norm: Norm of the joined gradient, so alike on each.
            step: Optimizer steps done before.
            first_index: Global sample index of the step's first sample.
            batches: This process's micro-batches.

        Raises:
            NonFiniteLoss: Something is not finite, and the run is to stop, or `MOST_IN_A_ROW` steps have been left out in a row.
        """
        values = {**{name: float(term) for name, term in loss._asdict().items()}, "gradient_norm": float(norm)}
        if all(math.isfinite(value) for value in values.values()):
            self._in_a_row = 0
            return True
        ids = self._ids(batches)
        shown = {name: repr(value) for name, value in values.items()}  # JSON has no word for nan
        self._write({"step": step + 1, **shown, "first_sample_index": first_index, "ids": ids})
        self._in_a_row += 1
        message = f"step {step + 1}: not finite: {', '.join(f'{name} {value}' for name, value in shown.items())}; ids {', '.join(ids)}"
        if self.action == "stop" or self._in_a_row >= MOST_IN_A_ROW:
            raise NonFiniteLoss(
                f"{message} (saved in {self.file}). The adapter is as it was after step {step}, which is in a checkpoint. Look at these "
                "samples; training.non_finite=skip leaves such batches out."
            )
        logger.warning("%s; this batch is left out", message)
        return False

    def _ids(self, batches: list[MosaicBatch]) -> list[str]:
        """Ids of the step's samples by global index: micro-batch by micro-batch, process by process."""
        places = [(micro_step, self.accelerator.process_index, batch.ids) for micro_step, batch in enumerate(batches)]
        return [name for _, _, names in sorted(gather_object(places)) for name in names]

    def _write(self, record: dict) -> None:
        if not self.accelerator.is_main_process:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.file, json.dumps(record, indent=2) + "\n")
        except OSError as error:
            logger.warning("%s: cannot be written: %s", self.file, error)
