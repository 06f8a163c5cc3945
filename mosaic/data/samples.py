"""What every data set yields, and the batches made of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One target with its K references, ready for the model.

    Attributes:
        id: Name of the sample in its data set.
        prompt: Caption of the target.
        target: float32 [3, H, W] in [-1, 1].
        references: float32 [K, 3, H_r, W_r] in [-1, 1].
        points: Per reference int64 [P_k, 2] of (u, v) on the training token grids; u unique within a reference, v in one reference only.
        missing: Names of the parts that the data set lacks for this sample ("mask", "points"); such a sample is not supervised.
    """

    id: str
    prompt: str
    target: Tensor
    references: Tensor
    points: list[Tensor]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class MosaicBatch:
    """Samples that share K and all sizes.

    Attributes:
        ids: Names of the B samples.
        prompts: B captions.
        targets: float32 [B, 3, H, W] in [-1, 1].
        references: float32 [B, K, 3, H_r, W_r] in [-1, 1].
        points: Per sample, per reference int64 [P_k, 2] of (u, v).
    """

    ids: list[str]
    prompts: list[str]
    targets: Tensor
    references: Tensor
    points: list[list[Tensor]]

    @property
    def num_references(self) -> int:
        """K."""
        return self.references.shape[1]


def collate(samples: Sequence[Sample]) -> MosaicBatch:
    """Join samples of one K and one size.

    Raises:
        ValueError: The samples differ in K or in size, or there are none.
    """
    if not samples:
        raise ValueError("a batch must hold at least one sample, got none.")
    for name, what in (("references", "number and size of references"), ("target", "target size")):
        shapes = {tuple(getattr(sample, name).shape) for sample in samples}
        if len(shapes) > 1:
            raise ValueError(f"the samples of a batch must share the {what}, got shapes {sorted(shapes)}. BucketBatchSampler groups them.")
    return MosaicBatch(
        ids=[sample.id for sample in samples],
        prompts=[sample.prompt for sample in samples],
        targets=torch.stack([sample.target for sample in samples]),
        references=torch.stack([sample.references for sample in samples]),
        points=[sample.points for sample in samples],
    )
