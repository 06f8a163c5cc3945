"""DINOv2 and DINOv3 patch tokens, and DINOv2 behind the adapter of DIY-SC (data facts B2, B3)."""

from typing import TYPE_CHECKING, ClassVar

import torch
from PIL import Image
from torch import Tensor

from mosaic.config.schema import Section
from mosaic.config.sections import Count, Side, Text
from mosaic.evaluation.pixels import IMAGENET_MEAN, IMAGENET_STD
from mosaic.method.grids import Grid
from mosaic.weights.frozen import load_model, short_digest
from preprocess.extractors.aggregation import load_aggregation
from preprocess.extractors.protocol import fitted_grid, picture_tensor, require_multiple

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Dinov2Options(Section):
    """Options of `dinov2`."""

    path: ClassVar[str] = "dinov2"

    model: Text = "facebook/dinov2-base"
    """Folder or hub id of a DINOv2 of transformers, with or without registers."""
    size: Side = 896
    """Long side in px to which pictures are resized; 896 describes 64 x 64 patches of 14 px."""
    layer: Count | None = None
    """Block whose output is taken, from 1; null: the last. Always before the final layer norm."""


class Dinov2DiyscOptions(Dinov2Options):
    """Options of `dinov2_diysc`."""

    path: ClassVar[str] = "dinov2_diysc"

    weights: Text | None = None
    """Adapter of one branch, such as DIY-SC's 0300_dino_spair; it must be given."""


class Dinov3Options(Dinov2Options):
    """Options of `dinov3`."""

    path: ClassVar[str] = "dinov3"

    model: Text = "facebook/dinov3-vitb16-pretrain-lvd1689m"
    """Folder or hub id of a DINOv3 ViT of transformers. Gated: accept its licence on the hub first."""
    size: Side = 1024
    """Long side in px to which pictures are resized; 1024 describes 64 x 64 patches of 16 px."""


class Dino:
    """Patch tokens of a DINO vision transformer: [768, 64, 64] for DINOv2-B/14 at 896 px."""

    def __init__(self, options: Dinov2Options, device: torch.device, dtype: torch.dtype) -> None:
        """Load the model.

        Raises:
            FileNotFoundError, ValueError: The model cannot be had, `size` is no multiple of its patch, or it has no such layer.
        """
        self.options, self.device, self.dtype = options, device, dtype
        self.provenance: dict[str, str] = {}
        self.model = load_vit(options.model, f"{options.path}.model", device, dtype)
        self.patch = self.model.config.patch_size
        require_multiple(f"{options.path}.size", options.size, self.patch)
        num_layers = self.model.config.num_hidden_layers
        if options.layer is not None and options.layer > num_layers:
            raise ValueError(f"{options.path}.layer must be at most {num_layers}, the number of blocks, got {options.layer}.")

    def grid(self, height: int, width: int) -> Grid:
        """One cell per patch."""
        return fitted_grid(height, width, self.options.size // self.patch)

    @torch.inference_mode()
    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Features of a picture; nothing is drawn, so the seed has no effect."""
        return patch_tokens(self.model, image, self.grid(image.height, image.width), self.options.layer)[0].float()


class Dinov2Diysc(Dino):
    """`Dino` behind an adapter that was trained to tell parts of a subject apart: [768, 64, 64], of length 1 per cell."""

    def __init__(self, options: Dinov2DiyscOptions, device: torch.device, dtype: torch.dtype) -> None:
        """Load the model and the adapter.

        Raises:
            FileNotFoundError, ValueError: As `Dino`; the adapter is missing, damaged, or made for another width.
        """
        if options.weights is None:
            raise ValueError("dinov2_diysc.weights must name the adapter's state dict, such as DIY-SC's 0300_dino_spair, got null.")
        super().__init__(options, device, dtype)
        width = self.model.config.hidden_size
        self.aggregation = load_aggregation(options.weights, "dinov2_diysc.weights", [width], device, dtype)
        self.provenance = {"weights_sha256": short_digest(options.weights)}

    @torch.inference_mode()
    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Features of a picture; nothing is drawn, so the seed has no effect."""
        tokens = patch_tokens(self.model, image, self.grid(image.height, image.width), self.options.layer)
        return self.aggregation(tokens)[0].float()


def load_vit(model: str, what: str, device: torch.device, dtype: torch.dtype) -> "PreTrainedModel":
    """A DINO vision transformer of transformers. Raises as `load_model`, and ValueError for a model of another kind."""
    from transformers import AutoModel

    vit = load_model(AutoModel, model, what, device, dtype)
    if not isinstance(getattr(vit.config, "patch_size", None), int) or "dino" not in vit.config.model_type:
        raise ValueError(f"{what}: {model} must be a DINO vision transformer, got a model of the type {vit.config.model_type}.")
    return vit


def patch_tokens(
    model: "PreTrainedModel", image: Image.Image, grid: Grid, layer: int | None, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Tensor:
    """Patch tokens after a block, before the final layer norm.

    Args:
        model: A DINO vision transformer.
        image: Is resized to the grid's patches.
        grid: In patches.
        layer: From 1; None for the last.
        resample: Filter.

    Returns:
        [1, C, rows, columns] in the model's dtype; the class token and any registers are dropped.
    """
    patch = model.config.patch_size
    pixels = picture_tensor(image, (grid.rows * patch, grid.columns * patch), IMAGENET_MEAN, IMAGENET_STD, resample)
    states = model(pixels.to(model.device, model.dtype), output_hidden_states=True).hidden_states
    prefix = 1 + getattr(model.config, "num_register_tokens", 0)
    tokens = states[-1 if layer is None else layer][:, prefix:]
    return tokens.transpose(1, 2).reshape(1, -1, grid.rows, grid.columns)
