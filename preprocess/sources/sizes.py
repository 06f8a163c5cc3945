"""How fine the grids of the points must be, of samples that are converted for a training that is planned."""

from math import ceil, sqrt

from mosaic.config.loading import Config
from mosaic.method.grids import PATCH
from mosaic.weights.digests import vae_scale_factor

DEFAULT_GRID = 64  # the grid of the released data set


def grid_of(config: Config) -> int:
    """Cells per side of a square picture: two per token, so that points can vote, but more than `DEFAULT_GRID` only where tokens need them.

    Args:
        config: Of the training; the model's token size is read from its VAE's config.

    Raises:
        FileNotFoundError, OSError: There is no such model, or it cannot be reached.
    """
    data, token = config.data, PATCH * vae_scale_factor(config.model.pretrained)
    sides = [sqrt(height * width) for height, width in data.buckets or [data.image_size]]
    tokens = ceil(max(*sides, data.reference_size) / token - 1e-9)
    return max(tokens, min(2 * tokens, DEFAULT_GRID))
