"""Between pictures and VAE latents, for any `AutoencoderKL`: shift and scale are the VAE's own."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from mosaic.devices import to_device


def images_to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size -> [B, 3, H, W] float32 in [-1, 1].

    Raises:
        ValueError: If the pictures differ in size.
    """
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"pictures of one batch must have one size, got (width, height) {sorted(sizes)}.")
    stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def encode_images(vae: AutoencoderKL, images: Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
    """Encode pictures to shifted and scaled latents, Eq. 3.

    Args:
        vae: The frozen VAE.
        images: [B, 3, H, W] in [-1, 1], in the VAE's dtype and on its device.
        generator: Draws a posterior sample (training targets), one for all or one per picture; None takes the posterior mode
            (references, reproducible).

    Returns:
        [B, C, H / f, W / f].
    """
    return draw_latents(vae.encode(images).latent_dist, vae.config.shift_factor, vae.config.scaling_factor, generator)


def draw_latents(
    posterior: DiagonalGaussianDistribution,
    shift_factor: float,
    scaling_factor: float,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:
    """Shifted and scaled latents of posteriors.

    Args:
        posterior: Of B pictures.
        shift_factor: The VAE's.
        scaling_factor: The VAE's.
        generator: Draws a sample, one for all or one per picture; None takes the mode.

    Returns:
        [B, C, h, w].
    """
    if generator is None:
        return (posterior.mode() - shift_factor) * scaling_factor
    # As `posterior.sample`, which would wait for the device to take the noise.
    source = (generator[0] if isinstance(generator, list) else generator).device
    noise = randn_tensor(posterior.mean.shape, generator=generator, device=source, dtype=posterior.parameters.dtype)
    latents = posterior.mean + posterior.std * to_device(noise, posterior.mean.device)
    return (latents - shift_factor) * scaling_factor


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Inverse of `encode_images`: [B, C, h, w] -> pictures [B, 3, H, W] in about [-1, 1]."""
    latents = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(latents).sample
