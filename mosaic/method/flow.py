"""Flow matching's noise process: x_t = (1 - t) x_0 + t eps, t = 1 pure noise, and the timesteps seen in training."""

import math

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor


def sample_timesteps(batch_size: int, num_target_tokens: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw training timesteps: t = sigmoid(N(0, 1)), then shifted towards noise by the target's resolution.

    t' = e^mu / (e^mu + 1/t - 1), with mu linear in the token count (256 -> 0.5, 4096 -> 1.15).

    Args:
        batch_size: B.
        num_target_tokens: N_tgt.
        generator: CPU generator.

    Returns:
        [B] float32 in (0, 1), on the CPU.
    """
    t = torch.sigmoid(torch.randn(batch_size, generator=generator))
    shift = math.exp(calculate_shift(num_target_tokens))
    return shift / (shift + 1 / t - 1)


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t eps, on latents (Eq. 3's noise on pixels is a slip of the pen).

    Args:
        latents: [B, N, C] clean packed latents.
        noise: [B, N, C].
        timesteps: [B] in [0, 1].
    """
    t = timesteps.to(latents)[:, None, None]
    return (1 - t) * latents + t * noise
