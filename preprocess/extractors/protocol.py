"""What a feature extractor is, and how pictures become its input. Needs Pillow, numpy and torch only."""

from typing import Protocol

from PIL import Image
from torch import Tensor

from mosaic.evaluation.pixels import HALF, normalised
from mosaic.images import to_rgb
from mosaic.method.grids import Grid


class Extractor(Protocol):
    """Describes every cell of a picture by a vector.

    Attributes:
        provenance: Whatever determines the features beside the options, such as digests of weight files; goes into the settings file.
    """

    provenance: dict[str, str]

    def grid(self, height: int, width: int) -> Grid:
        """Grid on which a picture of `height` x `width` px is described."""
        ...

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Features of a picture, float32 [C, rows, columns] on `grid(image.height, image.width)`; equal seeds draw equal noise."""
        ...


def fitted_grid(height: int, width: int, long_side: int, multiple: int = 1) -> Grid:
    """Grid with `long_side` cells along the longer side of a picture and nearly its aspect ratio.

    Args:
        height: Of the picture, px.
        width: Of the picture, px.
        long_side: Cells, a multiple of `multiple`.
        multiple: Of which both sides must be multiples; the shorter side is rounded to it, so the aspect ratio is kept only nearly.
    """

    def fitted(side: int) -> int:
        return max(multiple, round(long_side * side / max(height, width) / multiple) * multiple)

    return Grid(fitted(height), fitted(width))


def require_multiple(name: str, size: int, multiple: int) -> None:
    """Raise ValueError unless a size in pixels is a multiple of `multiple`."""
    if size % multiple:
        nearest = max(1, round(size / multiple)) * multiple
        raise ValueError(f"{name} must be a multiple of {multiple} px, got {size}. Nearest: {nearest}.")


def picture_tensor(
    image: Image.Image,
    size: tuple[int, int],
    mean: tuple[float, float, float] = HALF,
    std: tuple[float, float, float] = HALF,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Tensor:
    """A picture as a normalised tensor.

    Args:
        image: Any mode that `to_rgb` takes.
        size: Height and width in px to which it is resized.
        mean: Per channel, for values in [0, 1].
        std: Per channel.
        resample: Filter; Pillow's widen when they shrink.

    Returns:
        float32 [1, 3, height, width].
    """
    height, width = size
    image = to_rgb(image)
    if image.size != (width, height):
        image = image.resize((width, height), resample)
    return normalised(image, mean, std)[None]
