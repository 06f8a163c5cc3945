"""What the frozen encoders make of a batch, live or from the caches, and the token grids of its pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from mosaic.config.loading import DataConfig
from mosaic.data import MosaicBatch
from mosaic.data.samples import Posteriors, TextEmbeddings
from mosaic.devices import to_device
from mosaic.method.grids import Grid, token_grid
from mosaic.method.tokens import pack_latents
from mosaic.pipeline.encoders import Encoders, PromptEmbeddings
from mosaic.pipeline.latents import draw_latents


@dataclass(frozen=True)
class Grids:
    """Token grids of a batch, or those of `data.image_size` and `data.reference_size`."""

    target: Grid
    reference: Grid


@dataclass(frozen=True)
class EncodedBatch:
    """What the transformer reads of a batch, but for the noise, and the masks.

    Attributes:
        latents: [B, N_tgt, C], packed clean target latents.
        references: [B, K, N_ref, C], packed clean reference latents.
        prompt_embeds: [B, T, d_text].
        pooled: [B, d_pooled].
        grids: Those of the target's and of each reference's tokens.
        masks: float32 [B, K, N_tgt], the share of each target token that shows a reference, for the losses; None: they were not asked for.
    """

    latents: Tensor
    references: Tensor
    prompt_embeds: Tensor
    pooled: Tensor
    grids: Grids
    masks: Tensor | None = None


@torch.no_grad()
def encode_batch(
    encoders: Encoders,
    batch: MosaicBatch,
    prompts: Sequence[str],
    text_length: int,
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
) -> EncodedBatch:
    """Pictures to packed latents (`encode_images`), prompts to embeddings.

    Args:
        encoders: The frozen VAE and text encoders.
        batch: Pictures. Where it brings cached posteriors or embeddings, those are taken, and the encoders need not be there.
        prompts: B prompts, maybe dropped ones.
        text_length: T5 tokens.
        generator: Draws the targets from the VAE posterior, one for all or one per sample; None takes its mode. References always take
            the mode.
        device: Where cached tensors go; what is encoded is on the device of the encoders.

    Raises:
        ValueError: If a size is not divisible by the token size.
    """
    grids = batch_grids(batch, encoders.vae_scale_factor)
    if batch.posteriors is None:
        latents = encoders.encode_images(batch.targets, generator)
        references = encoders.encode_images(batch.references.flatten(0, 1))
    else:
        latents, references = draw_cached(batch.posteriors, device, generator)
    text = encoders.encode_prompts(prompts, text_length) if batch.text is None else select_cached(batch.text, prompts, device)
    masks = None if batch.masks is None else to_device(batch.masks, device)
    return EncodedBatch(pack_latents(latents), pack_latents(references).unflatten(0, (len(latents), -1)), *text, grids, masks)


def draw_cached(
    cached: Posteriors, device: torch.device, generator: torch.Generator | list[torch.Generator] | None
) -> tuple[Tensor, Tensor]:
    """Latents of targets [B, C, h, w] and references [B K, C, h, w], drawn as from the VAE itself.

    A cache holds posteriors and not latents, so that a run draws a new target latent each time it sees a sample, as without a cache.
    """
    posteriors = [DiagonalGaussianDistribution(to_device(moments, device)) for moments in (cached.target, cached.references.flatten(0, 1))]
    factors = cached.shift_factor, cached.scaling_factor
    return draw_latents(posteriors[0], *factors, generator), draw_latents(posteriors[1], *factors)


def select_cached(cached: TextEmbeddings, prompts: Sequence[str], device: torch.device) -> PromptEmbeddings:
    """[B, T, d_text] and [B, d_pooled] of the batch's prompts, of which dropped ones are empty."""
    is_empty = torch.tensor([not prompt for prompt in prompts])
    prompt_embeds = torch.where(is_empty[:, None, None], cached.empty_prompt_embeds, cached.prompt_embeds)
    pooled = torch.where(is_empty[:, None], cached.empty_pooled, cached.pooled)
    return PromptEmbeddings(to_device(prompt_embeds, device), to_device(pooled, device))


def batch_grids(batch: MosaicBatch, vae_scale_factor: int) -> Grids:
    """Token grids of a batch's own pictures; with buckets, batches differ in size.

    Args:
        batch: Its pictures' sizes.
        vae_scale_factor: Pixels per latent cell.

    Raises:
        ValueError: If a size is not divisible by the token size.
    """
    (height, width), reference = batch.targets.shape[-2:], batch.references.shape[-2:]
    return Grids(
        token_grid(height, width, vae_scale_factor, where="targets"),
        token_grid(reference[0], reference[1], vae_scale_factor, where="references"),
    )


def run_grids(data: DataConfig, vae_scale_factor: int) -> Grids:
    """Token grids that a config asks for.

    Args:
        data: The sizes.
        vae_scale_factor: Pixels per latent cell.

    Raises:
        ValueError: If a size is not divisible by the token size.
    """
    return Grids(
        token_grid(*data.image_size, vae_scale_factor, where="data.image_size"),
        token_grid(data.reference_size, data.reference_size, vae_scale_factor, where="data.reference_size"),
    )
