"""The encoder of any VAE of diffusers as an extractor: local appearance, little meaning. The pocket model brings such a VAE."""

from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from mosaic.config.schema import Section
from mosaic.config.sections import Side, Text
from mosaic.method.grids import Grid
from mosaic.weights.hub import POCKET_MODEL
from preprocess.extractors.hooks import outputs_until
from preprocess.extractors.protocol import fitted_grid, picture_tensor, require_multiple
from preprocess.extractors.stable_diffusion import load_vae


class VaeOptions(Section):
    """Options of `vae`."""

    path: ClassVar[str] = "vae"

    model: Text = POCKET_MODEL
    """Folder or hub id with an `AutoencoderKL` of diffusers."""
    subfolder: str = "vae"
    """Subfolder that holds it; "" for none."""
    size: Side = 256
    """Long side in px to which pictures are resized."""


class Vae:
    """Output of the encoder's middle block. No noise, no meaning beyond what the VAE's receptive field sees."""

    def __init__(self, options: VaeOptions, device: torch.device, dtype: torch.dtype) -> None:
        """Load the encoder.

        Raises:
            FileNotFoundError, ValueError: The model cannot be had, or `size` is no multiple of its stride.
        """
        self.options, self.device, self.dtype = options, device, dtype
        self.provenance: dict[str, str] = {}
        self.vae = load_vae(options.model, "vae.model", device, dtype, options.subfolder)
        self.stride = 2 ** (len(self.vae.config.block_out_channels) - 1)
        require_multiple("vae.size", options.size, self.stride)

    def grid(self, height: int, width: int) -> Grid:
        """One cell per latent cell."""
        return fitted_grid(height, width, self.options.size // self.stride)

    @torch.inference_mode()
    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Features of a picture; nothing is drawn, so the seed has no effect."""
        grid = self.grid(image.height, image.width)
        pixels = picture_tensor(image, (grid.rows * self.stride, grid.columns * self.stride)).to(self.device, self.dtype)
        return outputs_until([self.vae.encoder.mid_block], lambda: self.vae.encode(pixels))[0][0].float()
