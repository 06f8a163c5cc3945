"""Features compatible with GeoAware-SC: Stable Diffusion 1.5 and DINOv2, aggregated by its published network (data fact B2).

An approximation in one respect: GeoAware-SC conditions its U-Net on an image embedding and learned offsets of another project, whose
weights are not in the layout of diffusers. Here the prompt is empty, so that features resemble the published ones without being equal.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from mosaic.config.schema import Section
from mosaic.config.sections import Side, Text
from mosaic.method.grids import Grid
from mosaic.weights.frozen import short_digest
from preprocess.extractors.aggregation import load_aggregation
from preprocess.extractors.dino import load_vit, patch_tokens
from preprocess.extractors.hooks import outputs_until
from preprocess.extractors.protocol import fitted_grid, picture_tensor, require_multiple
from preprocess.extractors.stable_diffusion import STRIDE, load_unet, load_vae, noise_latents, prompt_embedding
from preprocess.matching.matching import resize_features

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

CELL = 16
TILE = 512
VAE_SCALE = 8
TIMESTEP = 50
NOISE_SEED = 42
HIDDEN_GAINS, SKIP_GAINS = (1.2, 1.4), (0.9, 0.2)
"""FreeU's b1, b2 and s1, s2: the first for the widest hidden states (1280 channels), the second for those of the second level (640)."""


class GeoawareOptions(Section):
    """Options of `geoaware`."""

    path: ClassVar[str] = "geoaware"

    weights: Text | None = None
    """Aggregation network, such as best_856.PTH of GeoAware-SC; it must be given. Its licence is not stated: look before you use it."""
    model: Text = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Folder or hub id of Stable Diffusion 1.5 in the layout of diffusers."""
    dino: Text = "facebook/dinov2-base"
    """Folder or hub id of DINOv2-B/14."""
    size: Side = 1024
    """Long side in px for Stable Diffusion; 1024 describes 64 x 64 cells (960 was used in the network's training)."""


class Geoaware:
    """Aggregated features of length 1 per cell: [768, 64, 64] at 1024 px."""

    def __init__(self, options: GeoawareOptions, device: torch.device, dtype: torch.dtype) -> None:
        """Load the models.

        Raises:
            FileNotFoundError, ValueError: A model or the network cannot be had or does not fit, or `size` is no multiple of 64.
        """
        require_multiple("geoaware.size", options.size, STRIDE)
        if options.weights is None:
            raise ValueError("geoaware.weights must name the aggregation network's state dict, such as best_856.PTH, got null.")
        self.options, self.device, self.dtype = options, device, dtype
        self.dino = load_vit(options.dino, "geoaware.dino", device, dtype)
        self.unet = load_unet(options.model, "geoaware.model", device, dtype)
        self.vae = load_vae(options.model, "geoaware.model", device, dtype)
        self.embedding = prompt_embedding(options.model, "", "geoaware.model", device, dtype)
        widths = self.unet.config.block_out_channels
        channels = [widths[1], widths[-1], widths[-1], self.dino.config.hidden_size]
        self.aggregation = load_aggregation(options.weights, "geoaware.weights", channels, device, dtype)
        self.provenance = {"weights_sha256": short_digest(options.weights)}

    def grid(self, height: int, width: int) -> Grid:
        """Cells of 16 px for Stable Diffusion, each of which is a patch for DINOv2."""
        return fitted_grid(height, width, self.options.size // CELL, STRIDE // CELL)

    @torch.inference_mode()
    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Features of a picture; the noise is the fixed one of GeoAware-SC, so the seed has no effect."""
        grid = self.grid(image.height, image.width)
        pixels = picture_tensor(image, (grid.rows * CELL, grid.columns * CELL), resample=Image.Resampling.LANCZOS)
        taps = [resize_features(tap, grid) for tap in self.tiled_taps(pixels.to(self.device, self.dtype))]
        tokens = patch_tokens(self.dino, image, grid, None, Image.Resampling.LANCZOS)[0].float()
        return self.aggregation(torch.cat([*taps, tokens])[None].to(self.dtype))[0].float()

    def tiled_taps(self, pixels: Tensor) -> list[Tensor]:
        """The U-Net's taps s3, s4, s5 of a picture [1, 3, H, W], from tiles of 512 px; float32 [C, H / stride, W / stride] each.

        Tiles at the far edges are shifted inwards; where tiles overlap, features are averaged.
        """
        height, width = pixels.shape[2:]
        sums: list[Tensor] = []
        for top in tile_starts(height):
            for left in tile_starts(width):
                taps = self.taps(pixels[..., top : top + TILE, left : left + TILE])
                strides = [min(height, TILE) // tap.shape[1] for tap in taps]
                if not sums:  # the last channel counts the tiles on a cell
                    sums = [
                        tap.new_zeros(len(tap) + 1, height // stride, width // stride) for tap, stride in zip(taps, strides, strict=True)
                    ]
                for total, tap, stride in zip(sums, taps, strides, strict=True):
                    area = total[:, top // stride :, left // stride :][:, : tap.shape[1], : tap.shape[2]]
                    area += torch.cat([tap, torch.ones_like(tap[:1])])
        return [total[:-1] / total[-1:] for total in sums]

    def taps(self, pixels: Tensor) -> list[Tensor]:
        """The taps s3, s4, s5 of one tile, float32 [C, rows, columns]."""
        unet = self.unet
        latents = self.vae.encode(pixels).latent_dist.mean * self.vae.config.scaling_factor
        side = TILE // VAE_SCALE
        noise = torch.randn(1, latents.shape[1], side, side, generator=torch.Generator().manual_seed(NOISE_SEED))
        noise = noise[..., : latents.shape[2], : latents.shape[3]].to(latents)
        modules = [unet.up_blocks[0].resnets[1], unet.up_blocks[1].attentions[1], unet.up_blocks[2].attentions[1]]
        noisy = noise_latents(latents, noise, TIMESTEP)
        with free_u(unet):
            found = outputs_until(modules, lambda: unet(noisy, TIMESTEP, encoder_hidden_states=self.embedding))
        return [amplified(tap, unet)[0].float() for tap in reversed(found)]


def tile_starts(side: int) -> list[int]:
    """Offsets of tiles along a side in px."""
    return [min(start, max(side - TILE, 0)) for start in range(0, side, TILE)]


def amplified(hidden: Tensor, unet: "UNet2DConditionModel") -> Tensor:
    """Hidden states [B, C, rows, columns] with the first half of their channels times FreeU's gain for their width.

    The published features are stored before this step but share its memory, so that they carry the gain too.
    """
    level = free_u_level(hidden.shape[1], unet)
    if level is None:
        return hidden
    half = hidden.shape[1] // 2
    return torch.cat([hidden[:, :half] * HIDDEN_GAINS[level], hidden[:, half:]], dim=1)


def free_u_level(channels: int, unet: "UNet2DConditionModel") -> int | None:
    """Which of FreeU's gains belong to hidden states of so many channels: 0 for the widest (1280), 1 for the second level (640)."""
    widths = unet.config.block_out_channels
    return 0 if channels == widths[-1] else 1 if channels == widths[1] else None


@contextmanager
def free_u(unet: "UNet2DConditionModel") -> Iterator[None]:
    """Apply FreeU by the width of the hidden states, as GeoAware-SC does; diffusers' own switch goes by the number of the block.

    Before every residual block of the decoder the first half of the hidden channels is amplified and the low frequencies of the skip
    connection are damped.
    """
    from diffusers.utils.torch_utils import fourier_filter

    def scaled(module: nn.Module, inputs: tuple[Tensor, ...], hidden_channels: int) -> tuple[Tensor, ...]:
        joined, *rest = inputs
        level = free_u_level(hidden_channels, unet)
        if level is None:
            return inputs
        hidden, skip = joined[:, :hidden_channels], joined[:, hidden_channels:]
        skip = fourier_filter(skip, threshold=1, scale=SKIP_GAINS[level])
        return torch.cat([amplified(hidden, unet), skip], dim=1), *rest

    channels = unet.mid_block.resnets[-1].out_channels
    with ExitStack() as stack:
        for block in unet.up_blocks:
            for resnet in block.resnets:
                hook = resnet.register_forward_pre_hook(lambda module, inputs, channels=channels: scaled(module, inputs, channels))
                stack.callback(hook.remove)
                channels = resnet.out_channels
        yield
