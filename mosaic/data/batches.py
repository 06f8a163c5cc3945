"""The micro-batches of a training run, from any step on."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from mosaic.data.sampler import BucketBatchSampler
from mosaic.data.samples import MosaicBatch, collate


def batches_from(
    step: int, dataset: Any, sampler: BucketBatchSampler, num_workers: int, start_worker: Callable[[int], None] | None = None
) -> Iterator[tuple[list[MosaicBatch], float]]:
    """The micro-batches of each optimizer step, and what the step counts (`BucketBatchSampler.shares`), without end.

    Args:
        step: The first optimizer step.
        dataset: The samples.
        sampler: Their order, epoch by epoch.
        num_workers: Processes that load; the batches do not depend on it.
        start_worker: Called in each of them at its start, with its number.
    """
    epoch, done = divmod(step, sampler.steps_per_epoch)
    while True:
        sampler.set_epoch(epoch, done)
        loader = iter(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers, worker_init_fn=start_worker))
        for share in sampler.shares():
            yield list(islice(loader, sampler.accumulation)), share
        epoch, done = epoch + 1, 0
