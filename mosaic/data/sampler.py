"""Batches of samples that agree in some small integers, such as K and the bucket of the target's aspect."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class BucketBatchSampler(Sampler[list[int]]):
    """Batches within groups of equal keys, in an order that is a pure function of (seed, epoch).

    Each group's samples are shuffled and cut into global batches of batch_size * world_size, of which every rank takes its own slice.
    So all ranks see the same keys at the same step, have the same number of batches, and the global batches do not depend on how
    many ranks share them. The remainder of each group is left out of the epoch (another one in each epoch), except where a group has too
    few samples for one global batch: those make one smaller batch per rank, with samples used twice only if there are fewer than
    ranks. A data loader that shards by itself (accelerate) must not shard this sampler again.
    """

    def __init__(self, keys: Sequence[int] | np.ndarray, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """Group the samples by their keys.

        Args:
            keys: Integers [N] or [N, M], one row per sample; a batch holds samples with equal rows. A reader's `batch_keys`, or its
                `num_references` where all targets have one size.
            batch_size: Samples per batch and rank.
            seed: Seed of the order.
            rank: This process, from 0.
            world_size: Number of processes.

        Raises:
            ValueError: A number is out of range, or there are no samples.
        """
        values = np.asarray(keys)
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size or not len(values):
            raise ValueError(
                "batch_size and world_size must be at least 1, rank in [0, world_size) and samples more than 0, got batch_size "
                f"{batch_size}, world_size {world_size}, rank {rank}, {len(values)} samples."
            )
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        _, group = np.unique(values.reshape(len(values), -1), axis=0, return_inverse=True)
        group = group.reshape(-1)
        self._groups = [np.flatnonzero(group == number) for number in range(group.max() + 1)]
        self._epoch = self._first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch that the next iteration goes through, and the number of its batches to leave out, for resuming."""
        self._epoch, self._first_batch = epoch, first_batch

    def __len__(self) -> int:
        """Number of batches of a whole epoch, the same on every rank."""
        return sum(max(1, len(group) // (self.batch_size * self.world_size)) for group in self._groups)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self._epoch])
        batches = [batch for group in self._groups for batch in self._global_batches(rng.permutation(group))]
        for number in rng.permutation(len(batches))[self._first_batch :]:
            yield np.split(batches[number], self.world_size)[self.rank].tolist()

    def _global_batches(self, indices: np.ndarray) -> list[np.ndarray]:
        """Cut the shuffled samples of one group into arrays whose lengths are equal multiples of world_size."""
        size = self.batch_size * self.world_size
        if len(indices) < size:
            size = max(1, len(indices) // self.world_size) * self.world_size
            indices = np.resize(indices, max(size, len(indices)))
        return [indices[start : start + size] for start in range(0, len(indices) - size + 1, size)]
