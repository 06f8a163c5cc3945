"""The objective on one batch: `train_step` reads top to bottom as Section 4 of the paper."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from mosaic.config.loading import Config, LossConfig
from mosaic.data import MosaicBatch
from mosaic.data.samples import Posteriors, TextEmbeddings
from mosaic.method.correspondence import batch_points, draw_points
from mosaic.method.flow import add_noise, sample_timesteps
from mosaic.method.grids import Grid, token_grid
from mosaic.method.losses import (
    MosaicLoss,
    correspondence_loss,
    disentanglement_loss,
    flow_matching_loss,
    mosaic_loss,
    reference_distributions,
)
from mosaic.method.tokens import pack_latents, position_ids, reference_position_ids, text_position_ids
from mosaic.model.attention_rows import CaptureRequest
from mosaic.model.transformer import MosaicTransformerOutput
from mosaic.pipeline.latents import draw_latents
from mosaic.pipeline.pipeline import MosaicFluxPipeline


@dataclass(frozen=True)
class Grids:
    """Token grids of a batch, or those of `data.image_size` and `data.reference_size`."""

    target: Grid
    reference: Grid


def disentanglement_weight(loss: LossConfig, step: int) -> float:
    """beta at a step: 0 until `disentanglement_start_step`, then linear over the warm-up to `disentanglement_weight`."""
    done = step - loss.disentanglement_start_step
    if loss.disentanglement_warmup_steps == 0:
        return loss.disentanglement_weight if done >= 0 else 0.0
    return loss.disentanglement_weight * min(max(done / loss.disentanglement_warmup_steps, 0.0), 1.0)


def is_supervised(loss: LossConfig, timesteps: Tensor) -> Tensor:
    """bool [B]: whether the attention losses count at the timesteps [B]; both ends of `supervised_timesteps` do."""
    low, high = loss.supervised_timesteps
    return (timesteps >= low) & (timesteps <= high)


def sample_generators(seed: int, first_index: int, count: int) -> list[torch.Generator]:
    """One CPU generator per sample, which depends only on (seed, global sample index).

    So a sample's dropout, points, latents, timestep and noise do not depend on which process, micro-batch or start of the run it
    falls into. Every new index, also of the same sample in a later epoch, gets new numbers.

    Args:
        seed: Seed of the run.
        first_index: Global sample index of the first sample: the number of samples that the run has seen before it.
        count: Number of samples, with indices in a row.
    """
    words = [np.random.SeedSequence([seed, index]).generate_state(1)[0] for index in range(first_index, first_index + count)]
    return [torch.Generator().manual_seed(int(word)) for word in words]


def train_step(
    pipeline: MosaicFluxPipeline,
    transformer: nn.Module,
    batch: MosaicBatch,
    config: Config,
    step: int,
    generators: list[torch.Generator],
) -> MosaicLoss:
    """The objective on one batch.

    Args:
        pipeline: Frozen VAE and text encoders, and their device and dtype.
        transformer: The transformer with its reference LoRA, maybe wrapped for several processes.
        batch: Pictures, prompts and points; one K.
        config: The run's settings.
        step: Optimizer step, for the schedule of the disentanglement weight.
        generators: CPU generator of everything random, of each sample its own (`sample_generators`).
    """
    device, loss = pipeline.transformer.device, config.loss
    num_references = batch.num_references
    grids = batch_grids(pipeline, batch)

    # Condition dropout: a dropped reference is zero latents, and its points go with it.
    drop_image, drop_text = _draw_dropout(config, generators)
    prompts = ["" if dropped else prompt for prompt, dropped in zip(batch.prompts, drop_text.tolist(), strict=True)]
    lists = [[p[:0] if dropped else p for p in sample] for sample, dropped in zip(batch.points, drop_image.tolist(), strict=True)]
    lists = [draw_points([sample], loss.max_points, own)[0] for sample, own in zip(lists, generators, strict=True)]
    points = batch_points(lists, grids.reference.num_tokens, grids.target.num_tokens, device)

    # Encode (Eq. 3): targets are drawn from the VAE posterior, references take its mode. All frozen.
    encoded = encode_batch(pipeline, batch, prompts, config.model.text_length, generators)
    kept = (~drop_image).to(encoded.references)[:, None, None, None]
    encoded = replace(encoded, references=encoded.references * kept)

    # Noise the target: x_t = (1 - t) x_0 + t eps.
    timesteps = torch.cat([sample_timesteps(1, grids.target.num_tokens, own) for own in generators]).to(device)
    noise = torch.stack([torch.randn(encoded.latents.shape[1:], generator=own) for own in generators]).to(encoded.latents)
    noisy_latents = add_noise(encoded.latents, noise, timesteps)

    # One joint sequence through all blocks; the supervised rows come back with the velocity.
    capture = CaptureRequest(points.global_index, loss.disentanglement_rows == "all", loss.capture_blocks)
    output = predict(pipeline, transformer, encoded, noisy_latents, timesteps, capture, grids, config.model.reference_attention)

    # The three terms.
    if loss.disentanglement_rows == "all":
        distributions, counted = output.reference_rows, (~drop_image).to(device)[:, None].expand(-1, num_references)
    else:
        distributions, counted = reference_distributions(output.attention_rows, points), points.reference_mask
    supervised = is_supervised(loss, timesteps).float()
    return mosaic_loss(
        flow_matching_loss(output.sample, noise, encoded.latents),
        correspondence_loss(output.attention_rows, points, loss.correspondence_reduction) * supervised,
        disentanglement_loss(distributions, counted, loss.divergence, loss.disentanglement_cap) * supervised,
        loss.correspondence_weight,
        disentanglement_weight(loss, step),
    )


@dataclass(frozen=True)
class EncodedBatch:
    """What the frozen encoders make of a batch.

    Attributes:
        latents: [B, N_tgt, C], packed clean target latents.
        references: [B, K, N_ref, C], packed clean reference latents.
        prompt_embeds: [B, T, d_text].
        pooled: [B, d_pooled].
    """

    latents: Tensor
    references: Tensor
    prompt_embeds: Tensor
    pooled: Tensor


@torch.no_grad()
def encode_batch(
    pipeline: MosaicFluxPipeline,
    batch: MosaicBatch,
    prompts: list[str],
    text_length: int,
    generator: torch.Generator | list[torch.Generator] | None,
) -> EncodedBatch:
    """Pictures to packed latents, prompts to embeddings (Eq. 3).

    Args:
        pipeline: Frozen VAE and text encoders.
        batch: Pictures. Where it brings cached posteriors or embeddings, those are taken, and the encoders need not be there.
        prompts: B prompts, maybe dropped ones.
        text_length: T5 tokens.
        generator: Draws the targets from the VAE posterior, one for all or one per sample; None takes its mode. References always take
            the mode.
    """
    device = pipeline.transformer.device
    if batch.posteriors is None:
        latents = pipeline.encoders.encode_images(batch.targets, generator)
        references = pipeline.encoders.encode_images(batch.references.flatten(0, 1))
    else:
        latents, references = draw_cached(batch.posteriors, device, generator)
    if batch.text is None:
        prompt_embeds, pooled = pipeline.encoders.encode_prompts(prompts, text_length)
    else:
        prompt_embeds, pooled = select_cached(batch.text, prompts, device)
    return EncodedBatch(pack_latents(latents), pack_latents(references).unflatten(0, (len(latents), -1)), prompt_embeds, pooled)


def draw_cached(
    cached: Posteriors, device: torch.device, generator: torch.Generator | list[torch.Generator] | None
) -> tuple[Tensor, Tensor]:
    """Latents of targets [B, C, h, w] and references [B K, C, h, w], drawn as from the VAE itself."""
    posteriors = [DiagonalGaussianDistribution(moments.to(device)) for moments in (cached.target, cached.references.flatten(0, 1))]
    factors = cached.shift_factor, cached.scaling_factor
    return draw_latents(posteriors[0], *factors, generator), draw_latents(posteriors[1], *factors)


def select_cached(cached: TextEmbeddings, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """[B, T, d_text] and [B, d_pooled] of the batch's prompts, of which dropped ones are empty."""
    is_empty = torch.tensor([not prompt for prompt in prompts])
    prompt_embeds = torch.where(is_empty[:, None, None], cached.empty_prompt_embeds, cached.prompt_embeds)
    return prompt_embeds.to(device), torch.where(is_empty[:, None], cached.empty_pooled, cached.pooled).to(device)


def predict(
    pipeline: MosaicFluxPipeline,
    transformer: nn.Module,
    encoded: EncodedBatch,
    noisy_latents: Tensor,
    timesteps: Tensor,
    capture: CaptureRequest,
    grids: Grids,
    reference_attention: str,
) -> MosaicTransformerOutput:
    """Velocity and attention rows of a batch; embedded guidance is 1, as always in training."""
    device = noisy_latents.device
    return transformer(
        hidden_states=noisy_latents,
        encoder_hidden_states=encoded.prompt_embeds,
        pooled_projections=encoded.pooled,
        timestep=timesteps,
        guidance=torch.ones_like(timesteps) if pipeline.transformer.config.guidance_embeds else None,
        img_ids=position_ids(grids.target, device=device),
        txt_ids=text_position_ids(encoded.prompt_embeds.shape[1], device),
        reference_hidden_states=encoded.references,
        reference_ids=reference_position_ids(grids.reference, encoded.references.shape[1], device),
        reference_attention=reference_attention,
        capture=capture,
    )


def batch_grids(pipeline: MosaicFluxPipeline, batch: MosaicBatch) -> Grids:
    """Token grids of a batch's own pictures; with buckets, batches differ in size.

    Raises:
        ValueError: If a size is not divisible by the token size.
    """
    factor = pipeline.encoders.vae_scale_factor
    return Grids(
        token_grid(*batch.targets.shape[-2:], factor, where="targets"),
        token_grid(*batch.references.shape[-2:], factor, where="references"),
    )


def run_grids(pipeline: MosaicFluxPipeline, config: Config) -> Grids:
    """Token grids that a config asks for with this VAE.

    Raises:
        ValueError: If a size is not divisible by the token size.
    """
    factor, data = pipeline.encoders.vae_scale_factor, config.data
    return Grids(
        token_grid(*data.image_size, factor, where="data.image_size"),
        token_grid(data.reference_size, data.reference_size, factor, where="data.reference_size"),
    )


def _draw_dropout(config: Config, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    """bool [B] each: which samples lose their references, which their prompt; the three cases exclude one another."""
    data = config.data
    u = torch.cat([torch.rand(1, generator=own) for own in generators])
    image_only, text_only = data.image_dropout, data.image_dropout + data.text_dropout
    both = text_only + data.both_dropout
    drop_both = (u >= text_only) & (u < both)
    return (u < image_only) | drop_both, ((u >= image_only) & (u < text_only)) | drop_both
