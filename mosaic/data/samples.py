"""What every data set yields, and the batches made of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Posteriors:
    """What the VAE makes of the pictures of a sample or batch, read from a latent cache; mean, then logarithmic variance, along 2 C.

    Attributes:
        target: [2 C, h, w], in a batch [B, 2 C, h, w].
        references: [K, 2 C, h, w], in a batch [B, K, 2 C, h, w].
        shift_factor: The VAE's, taken off a latent drawn from a posterior.
        scaling_factor: The VAE's, which multiplies the shifted latent.
    """

    target: Tensor
    references: Tensor
    shift_factor: float
    scaling_factor: float


@dataclass(frozen=True)
class TextEmbeddings:
    """What the text encoders make of the prompt of a sample or the prompts of a batch, read from a text cache.

    Attributes:
        prompt_embeds: [T, d_text], in a batch [B, T, d_text].
        pooled: [d_pooled], in a batch [B, d_pooled].
        empty_prompt_embeds: [T, d_text], of the empty prompt.
        empty_pooled: [d_pooled], of the empty prompt.
    """

    prompt_embeds: Tensor
    pooled: Tensor
    empty_prompt_embeds: Tensor
    empty_pooled: Tensor


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
        posteriors: Cached ones of the pictures; None: the pictures are to be encoded.
        text: Cached embeddings of the prompt; None: the prompt is to be encoded.
        masks: float32 [K, N_tgt], the share of each target token that shows the reference; 0 everywhere where its mask is not known. None:
            they were not asked for.
    """

    id: str
    prompt: str
    target: Tensor
    references: Tensor
    points: list[Tensor]
    missing: tuple[str, ...] = ()
    posteriors: Posteriors | None = None
    text: TextEmbeddings | None = None
    masks: Tensor | None = None


def left_to_right(sample: Sample, columns: int) -> Sample:
    """The references in the order in which their subjects stand in the target: by the mean column of their points, then as they stood.

    Args:
        sample: As read, without cached posteriors; references without points come last.
        columns: Of the target in tokens.
    """
    assert sample.posteriors is None, "they would stay in the old order"
    places = [float((pairs[:, 1] % columns).double().mean()) if len(pairs) else math.inf for pairs in sample.points]
    order = sorted(range(len(places)), key=places.__getitem__)
    masks = None if sample.masks is None else sample.masks[order]
    return replace(sample, references=sample.references[order], points=[sample.points[k] for k in order], masks=masks)


@dataclass(frozen=True)
class MosaicBatch:
    """Samples that share K and all sizes.

    Attributes:
        ids: Names of the B samples.
        prompts: B captions.
        targets: float32 [B, 3, H, W] in [-1, 1].
        references: float32 [B, K, 3, H_r, W_r] in [-1, 1].
        points: Per sample, per reference int64 [P_k, 2] of (u, v).
        posteriors: Cached ones of the pictures; None: the pictures are to be encoded.
        text: Cached embeddings of the prompts; None: the prompts are to be encoded.
        masks: float32 [B, K, N_tgt], see `Sample`; None: they were not asked for.
    """

    ids: list[str]
    prompts: list[str]
    targets: Tensor
    references: Tensor
    points: list[list[Tensor]]
    posteriors: Posteriors | None = None
    text: TextEmbeddings | None = None
    masks: Tensor | None = None

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
        posteriors=_join_posteriors([sample.posteriors for sample in samples if sample.posteriors is not None]),
        text=_join_text([sample.text for sample in samples if sample.text is not None]),
        masks=torch.stack(masks) if (masks := [sample.masks for sample in samples if sample.masks is not None]) else None,
    )


def _join_posteriors(found: list[Posteriors]) -> Posteriors | None:
    if not found:
        return None
    targets, references = torch.stack([one.target for one in found]), torch.stack([one.references for one in found])
    return replace(found[0], target=targets, references=references)


def _join_text(found: list[TextEmbeddings]) -> TextEmbeddings | None:
    if not found:
        return None
    embeds, pooled = torch.stack([one.prompt_embeds for one in found]), torch.stack([one.pooled for one in found])
    return replace(found[0], prompt_embeds=embeds, pooled=pooled)
