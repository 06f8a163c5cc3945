"""How hard each loss pulls at the adapter, and which way: gradients of the three terms on one batch.

Where two losses want the same their gradients point the same way. Where training has come to rest between them they point against each
other, weighted equally long: then neither has what it would have alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mosaic.config import Config, LossConfig
from mosaic.data import MosaicBatch
from mosaic.lora import reference_lora_parameters
from mosaic.losses import MosaicLoss
from mosaic.objective import sample_generators, train_step
from mosaic.pipeline import MosaicFluxPipeline


class Pulls(NamedTuple):
    """Of one batch, with g_FM, g_SCAL and g_MDL the gradients of the three terms by all weights of the adapter.

    Attributes:
        flow_matching: L_diff.
        correspondence_pull: |alpha g_SCAL| / |g_FM| at the paper's alpha.
        correspondence_cosine: Of the angle between g_SCAL and g_FM; -1: SCAL undoes what flow matching wants.
        disentanglement_pull: |beta g_MDL| / |g_FM| at the paper's beta.
        disentanglement_cosine: Of the angle between g_MDL and g_FM.
    """

    flow_matching: float
    correspondence_pull: float
    correspondence_cosine: float
    disentanglement_pull: float
    disentanglement_cosine: float


def paper_objective(config: Config) -> Config:
    """The config with the preset paper's losses and no dropout, so that adapters of all arms are asked the same."""
    return replace(config, loss=LossConfig(), data=replace(config.data, image_dropout=0.0, text_dropout=0.0, both_dropout=0.0))


def loss_pulls(pipeline: MosaicFluxPipeline, batch: MosaicBatch, config: Config, seed: int, first_index: int) -> Pulls:
    """The pulls on one batch.

    Args:
        pipeline: Its reference LoRA is what the gradients are of; it is left as it was.
        batch: Pictures, prompts and points; one K.
        config: Of `paper_objective`.
        seed: Of the noise and the timesteps.
        first_index: Of the batch's first sample among all that are measured.
    """
    parameters = list(reference_lora_parameters(pipeline.transformer).values())
    trainable = [parameter.requires_grad for parameter in parameters]

    def terms() -> MosaicLoss:
        generators = sample_generators(seed, first_index, len(batch.prompts))
        return train_step(pipeline, pipeline.transformer, batch, config, 0, generators)

    def gradient(term: Tensor) -> Tensor:
        found = torch.autograd.grad(term, parameters, allow_unused=True)
        return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)])

    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        # Each term its own forward pass: what is recomputed in the backward pass is recomputed once only.
        flow_matching = terms().flow_matching
        diffusion, correspondence, disentanglement = (
            gradient(term) for term in (flow_matching, terms().correspondence, terms().disentanglement)
        )
    finally:
        for parameter, before in zip(parameters, trainable, strict=True):
            parameter.requires_grad_(before)
    return Pulls(
        flow_matching.item(),
        *_pull(correspondence, diffusion, config.loss.correspondence_weight),
        *_pull(disentanglement, diffusion, config.loss.disentanglement_weight),
    )


def _pull(gradient: Tensor, reference: Tensor, weight: float) -> Sequence[float]:
    cosine = torch.cosine_similarity(gradient, reference, dim=0)
    return (weight * gradient.norm() / reference.norm()).item(), cosine.item()
