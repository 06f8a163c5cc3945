"""What a stage is: settings that decide, and a worker that computes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from mosaic.config.schema import Section
from preprocess.construct.candidates import Candidate
from preprocess.construct.rows import Row


class Worker(Protocol):
    """The models of a stage, loaded.

    Attributes:
        provenance: What decides its results beside the settings: models, revisions, digests; as JSON values.
    """

    provenance: dict[str, Any]

    def __call__(self, candidates: Sequence[Candidate], folder: Path) -> Iterator[Row]:
        """Compute a chunk.

        Args:
            candidates: Those of the chunk that earlier stages have let through, in order; batches are made of neighbours among them.
            folder: Where pictures and other files go, by the names of `picture_name`. It becomes the stage's folder of the chunk when all
                is there.

        Yields:
            One row for each candidate, in their order.
        """


@dataclass(frozen=True)
class Stage:
    """A stage as the config has it; nothing is loaded.

    Attributes:
        name: As in the config and in `Candidate`.
        row: What it writes.
        settings: Its section. What stands in the section's `limits` decides only, all else computes.
        load: Loads the models onto a device and gives the worker.
        reasons: Why a candidate with this stage's row is dropped here, by the names of the limits; empty: it goes on. A pure function of
            the rows so far and the limits.
        inputs: What a row was computed from beside the earlier stages' files, as JSON values: where limits of earlier stages choose other
            inputs than before, the row is computed again.
    """

    name: str
    row: type[Row]
    settings: Section
    load: Callable[[torch.device], Worker]
    reasons: Callable[[Candidate], list[str]]
    inputs: Callable[[Candidate], Any] = lambda candidate: None
