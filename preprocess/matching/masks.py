"""Which cells show the subject: from mask pictures, and from the white background of references."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mosaic.method.grids import Grid

COVERAGE = 0.5
"""Share of a cell that must be covered. Taking a cell's corner pixel instead, as the release does, shifts borders by half a cell."""


def covered_cells(mask: np.ndarray, grid: Grid) -> Tensor:
    """Cells of which a mask covers at least half.

    Args:
        mask: Bool [height, width].
        grid: Grid over the same frame; it need not divide the pixels.

    Returns:
        bool [rows, columns].
    """
    shares = Image.fromarray(mask.astype(np.float32)).resize((grid.columns, grid.rows), Image.Resampling.BOX)
    return torch.from_numpy(np.array(shares)) >= COVERAGE


def subject_mask(reference: Image.Image, white_threshold: int) -> np.ndarray:
    """Pixels of a reference that are not near white (data fact A7).

    White parts of the subject count as background too: a threshold cannot tell them apart.

    Args:
        reference: RGB picture of a subject on white.
        white_threshold: A pixel is background if all its channels are at least 255 minus this (5 in the release's DIFT matcher, 10 in
            its GeoAware one).

    Returns:
        Bool [height, width], True on the subject.
    """
    return np.asarray(reference).min(axis=-1) < 255 - white_threshold


def on_black(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """A picture with everything outside the mask black; the mask [height, width] is resized (nearest) to the picture."""
    paper = Image.fromarray(mask.astype(np.uint8) * 255).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(image, Image.new("RGB", image.size), paper)
