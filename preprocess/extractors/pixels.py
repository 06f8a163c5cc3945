"""Colours around every cell as its description: no weights, quick, and blind to meaning.

It finds flat-coloured drawings again, such as the pocket world's, after moderate turns, mirroring and scaling. It fails on photographs
whose light, viewpoint or texture changes, and cannot tell parts of equal colour apart. For a first try and for tests; use a learned
extractor for real data.
"""

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor

from mosaic.config.schema import Section
from mosaic.method.grids import Grid
from preprocess.extractors.protocol import fitted_grid, picture_tensor
from preprocess.matching.settings import GridSide

CELL = 2
"""Pixels per cell of the resized picture: its colours and its contrast are the finest description."""
Scales = Annotated[int, Field(ge=1, le=6)]


class PixelsOptions(Section):
    """Options of `pixels`."""

    path: ClassVar[str] = "pixels"

    cells: GridSide = 64
    """Cells along the long side."""
    scales: Scales = 4
    """Radii around a cell whose mean colour and contrast are taken: 0, 1, 3, 7, ... cells."""


class Pixels:
    """Mean colour and contrast in windows of growing radius around each cell: [1 + 6 scales, rows, columns].

    Windows are square and symmetric, so a mirrored picture has mirrored features. A constant channel keeps cosines of dark cells defined.
    """

    def __init__(self, options: PixelsOptions, device: torch.device, dtype: torch.dtype) -> None:
        """Take the options; `dtype` has no effect, all is computed in float32."""
        self.options, self.device = options, device
        self.provenance: dict[str, str] = {}

    def grid(self, height: int, width: int) -> Grid:
        """`cells` along the long side."""
        return fitted_grid(height, width, self.options.cells)

    @torch.inference_mode()
    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Features of a picture; nothing is drawn, so the seed has no effect."""
        grid = self.grid(image.height, image.width)
        pixels = picture_tensor(image, (grid.rows * CELL, grid.columns * CELL)).to(self.device)
        mean, square = F.avg_pool2d(pixels, CELL), F.avg_pool2d(pixels.square(), CELL)
        parts = [torch.full_like(mean[:, :1], 0.5)]
        for scale in range(self.options.scales):
            radius = 2**scale - 1
            window = {"kernel_size": 2 * radius + 1, "stride": 1, "padding": radius, "count_include_pad": False}
            colour = F.avg_pool2d(mean, **window)
            contrast = (F.avg_pool2d(square, **window) - colour.square()).clamp(min=0).sqrt()
            parts += [colour, contrast]
        return torch.cat(parts, dim=1)[0]
