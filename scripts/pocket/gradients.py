"""How hard each loss pulls at the adapter, and which way: gradients of the three terms, averaged over many samples.

Where two losses want the same their gradients point the same way. Where training has come to rest between them they point against each
other: neither has what it would have alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mosaic.config.loading import Config, LossConfig
from mosaic.data import MosaicBatch
from mosaic.lora.adapter import reference_lora_parameters
from mosaic.method.losses import MosaicLoss
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.training.objective import call_settings, draw_inputs, sample_generators, train_step


class Gradients(NamedTuple):
    """Of one batch.

    Attributes:
        samples: Of the batch.
        loss: L_diff.
        flow_matching: g_FM, the gradient of L_diff by all weights of the adapter, in one row.
        correspondence: g_SCAL, the gradient of L_SCA without its weight by the same weights.
        disentanglement: g_MDL, the gradient of L_MD without its weight by the same weights.
    """

    samples: int
    loss: float
    flow_matching: Tensor
    correspondence: Tensor
    disentanglement: Tensor


class Pulls(NamedTuple):
    """Of the mean gradients over batches; from batch to batch they vary, and what varies is not all averaged away.

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
    return config.replace(loss=LossConfig(), data=config.data.replace(image_dropout=0.0, text_dropout=0.0, both_dropout=0.0))


def batch_gradients(pipeline: MosaicFluxPipeline, batch: MosaicBatch, config: Config, seed: int, first_index: int) -> Gradients:
    """The gradients on one batch.

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
        inputs = draw_inputs(pipeline.encoders, batch, config, generators, pipeline.transformer.device)
        return train_step(pipeline.transformer, *inputs, config.loss, 0, call_settings(config, pipeline.transformer))

    def gradient(term: Tensor) -> Tensor:
        found = torch.autograd.grad(term, parameters, allow_unused=True)
        return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)])

    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        # A forward pass for each: attention that is computed again in the backward pass allows one of those.
        loss = terms().flow_matching
        gradients = (gradient(term) for term in (loss, terms().correspondence, terms().disentanglement))
        return Gradients(len(batch.prompts), loss.item(), *gradients)
    finally:
        for parameter, before in zip(parameters, trainable, strict=True):
            parameter.requires_grad_(before)


def mean_pulls(batches: Sequence[Gradients], config: Config) -> Pulls:
    """The pulls of the gradients' means over all samples.

    Args:
        batches: At least one.
        config: Of `paper_objective`, for the weights.
    """
    total = sum(batch.samples for batch in batches)

    def mean(name: str) -> Tensor:
        return sum((batch.samples / total * torch.as_tensor(getattr(batch, name)) for batch in batches), torch.zeros(()))

    reference = mean("flow_matching")
    weights = {"correspondence": config.loss.correspondence_weight, "disentanglement": config.loss.disentanglement_weight}
    found = {}
    for name, weight in weights.items():
        gradient = mean(name)
        found[f"{name}_pull"] = (weight * gradient.norm() / reference.norm()).item()
        found[f"{name}_cosine"] = torch.cosine_similarity(gradient, reference, dim=0).item()
    return Pulls(flow_matching=mean("loss").item(), **found)
