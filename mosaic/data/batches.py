"""The micro-batches of a training run, from any step on."""

from collections.abc import Callable, Generator
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from mosaic.commands import is_meant
from mosaic.data.sampler import BucketBatchSampler
from mosaic.data.samples import MosaicBatch, collate
from mosaic.data.workers import loaded


def batches_from(
    step: int, dataset: Any, sampler: BucketBatchSampler, num_workers: int, start_worker: Callable[[int], None] | None = None
) -> Generator[tuple[list[MosaicBatch], float]]:
    """The micro-batches of each optimizer step, and what the step counts (`BucketBatchSampler.shares`), without end.

    Args:
        step: The first optimizer step.
        dataset: The samples.
        sampler: Their order, epoch by epoch.
        num_workers: Processes that load; the batches do not depend on it.
        start_worker: Called in each of them at its start, with its number.

    Raises:
        OSError, ValueError: A sample cannot be read, or a process that loads has died.
    """
    epoch, done = divmod(step, sampler.steps_per_epoch)
    while True:
        sampler.set_epoch(epoch, done)
        loader = DataLoader(
            Batches(dataset), batch_sampler=sampler, collate_fn=_as_it_is, num_workers=num_workers, worker_init_fn=start_worker
        )
        with closing(loaded(loader)) as batches:
            for share in sampler.shares():
                yield [_checked(batch) for batch in islice(batches, sampler.accumulation)], share
        epoch, done = epoch + 1, 0


class BadBatch(NamedTuple):
    """What stands in the place of a micro-batch that cannot be read.

    Attributes:
        message: The error's text.
        of_machine: Whether the error is of the machine, and not of the data.
    """

    message: str
    of_machine: bool


class Batches(Dataset[MosaicBatch | BadBatch]):
    """The micro-batches of a data set, made where the samples are read.

    An error that is meant for users comes as a value: PyTorch would send the text of its traceback in its place. Of any other one, a fault
    of ours, that text is wanted.
    """

    def __init__(self, dataset: Any) -> None:
        """Name the samples."""
        self.dataset = dataset

    def __getitems__(self, indices: list[int]) -> MosaicBatch | BadBatch:
        """Read and collate samples."""
        try:
            return collate([self.dataset[index] for index in indices])
        except (OSError, ValueError) as error:
            if not is_meant(error):
                raise
            return BadBatch(str(error), isinstance(error, OSError))


def _as_it_is(batch: Any) -> Any:
    return batch


def _checked(batch: MosaicBatch | BadBatch) -> MosaicBatch:
    """The batch itself.

    Raises:
        OSError, ValueError: It could not be read.
    """
    if not isinstance(batch, BadBatch):
        return batch
    raise OSError(batch.message) if batch.of_machine else ValueError(batch.message)
