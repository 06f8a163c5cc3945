"""Token grids: how many tokens a picture has, and in which order. Needs no torch.

One token is a 2 x 2 patch of VAE latents (16 x 16 px on FLUX). Token index = row * columns + column everywhere.
"""

from numbers import Integral
from typing import NamedTuple

PATCH = 2  # side of the latent patch that FLUX packs into one token


class Grid(NamedTuple):
    """A token grid, in tokens. Order is always (rows, columns), as (height, width) for pixels."""

    rows: int
    columns: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the grid."""
        return self.rows * self.columns


def token_grid(height: int, width: int, vae_scale_factor: int = 8, where: str = "image size") -> Grid:
    """The token grid of a picture of `height` x `width` pixels.

    Args:
        height: In pixels.
        width: In pixels.
        vae_scale_factor: Pixels per latent cell (8 on FLUX).
        where: What the size belongs to; used in the message only.

    Raises:
        ValueError: If a side is not a positive integer multiple of the token size.
    """
    token_size = vae_scale_factor * PATCH
    if not all(isinstance(side, Integral) for side in (height, width)):
        raise ValueError(f"{where}: height and width must be integers, got {height!r} x {width!r}.")
    if height <= 0 or width <= 0 or height % token_size or width % token_size:
        raise ValueError(
            f"{where}: height and width must be positive multiples of the token size {token_size} px, got {height} x {width}. "
            f"Nearest: {_nearest(height, token_size)} x {_nearest(width, token_size)}."
        )
    return Grid(height // token_size, width // token_size)


def _nearest(side: int, token_size: int) -> int:
    return max(token_size, round(side / token_size) * token_size)
