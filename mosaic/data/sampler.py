"""Batches of samples that agree in some small integers, such as K and the bucket of the target's aspect."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class BucketBatchSampler(Sampler[list[int]]):
    """Batches within groups of equal keys, in an order that is a pure function of (seed, epoch, position).

    Each group's samples are shuffled and cut into global batches of `accumulation * world_size * batch_size` samples, one per optimizer
    step, all of one length. A global batch is cut into equal slices: micro-batch m of rank r is slice m * world_size + r. So the
    samples of a step depend on the size of the global batch only, not on how micro-batches and ranks share it; all ranks see the
    same keys at the same time; and the mean over the slices' means is the mean over the samples. The remainder of each group is left
    out of the epoch (another one in each epoch); a group with too few samples for one global batch fills one by repeating them, and
    `shares` says what that batch is to count, so that no sample counts more than another. A data loader that shards by itself
    (accelerate) must not shard this sampler again.
    """

    def __init__(
        self, keys: Sequence[int] | np.ndarray, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, accumulation: int = 1
    ) -> None:
        """Group the samples by their keys.

        Args:
            keys: Integers [N] or [N, M], one row per sample; a batch holds samples with equal rows. A reader's `batch_keys`, or its
                `num_references` where all targets have one size.
            batch_size: Samples per micro-batch and rank.
            seed: Seed of the order.
            rank: This process, from 0.
            world_size: Number of processes.
            accumulation: Micro-batches per optimizer step.

        Raises:
            ValueError: A number is out of range, or there are no samples.
        """
        values = np.asarray(keys)
        if min(batch_size, world_size, accumulation) < 1 or not 0 <= rank < world_size or not len(values):
            raise ValueError(
                "batch_size, world_size and accumulation must be at least 1, rank in [0, world_size) and samples more than 0, got "
                f"batch_size {batch_size}, world_size {world_size}, accumulation {accumulation}, rank {rank}, {len(values)} samples."
            )
        self.seed, self.rank, self.world_size, self.accumulation = seed, rank, world_size, accumulation
        self.global_batch = accumulation * world_size * batch_size
        _, group = np.unique(values.reshape(len(values), -1), axis=0, return_inverse=True)
        group = group.reshape(-1)
        self._groups = [np.flatnonzero(group == number) for number in range(group.max() + 1)]
        self._epoch = self._first_step = 0

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch that the next iteration goes through, and the number of its global batches to leave out, for resuming."""
        self._epoch, self._first_step = epoch, first_step

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches of an epoch."""
        return sum(max(1, len(group) // self.global_batch) for group in self._groups)

    @property
    def num_repeated(self) -> int:
        """Number of samples in groups smaller than a global batch, which are repeated to fill one."""
        return sum(len(group) for group in self._groups if len(group) < self.global_batch)

    def shares(self) -> list[float]:
        """What each global batch of the next iteration counts: 1; for one of n samples that are repeated to fill it n / global batch."""
        return [share for _, share in self._epoch_batches()]

    def __len__(self) -> int:
        """Number of micro-batches of a whole epoch, the same on every rank."""
        return self.steps_per_epoch * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for batch, _ in self._epoch_batches():
            for slices in np.split(batch, self.accumulation):
                yield np.split(slices, self.world_size)[self.rank].tolist()

    def _epoch_batches(self) -> list[tuple[np.ndarray, float]]:
        """Global batches of the chosen epoch from its first step on, and what each counts."""
        rng = np.random.default_rng([self.seed, self._epoch])
        batches = [batch for group in self._groups for batch in self._global_batches(rng.permutation(group))]
        return [batches[number] for number in rng.permutation(len(batches))[self._first_step :]]

    def _global_batches(self, indices: np.ndarray) -> list[tuple[np.ndarray, float]]:
        """Cut the shuffled samples of one group into global batches."""
        size, share = self.global_batch, min(len(indices) / self.global_batch, 1.0)
        indices = np.resize(indices, max(size, len(indices)))
        return [(indices[start : start + size], share) for start in range(0, len(indices) - size + 1, size)]
