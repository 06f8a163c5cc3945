"""Geometry: images <-> latents <-> packed tokens, and the RoPE position ids of the three token groups.

One token is a 2 x 2 patch of VAE latents (16 x 16 px on FLUX). Token index = row * columns + column everywhere.
"""

from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

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


def pack_latents(latents: Tensor) -> Tensor:
    """Pack 2 x 2 latent patches into tokens, as FLUX does.

    Args:
        latents: [B, C, h, w], h and w even.

    Returns:
        [B, h/2 * w/2, 4 C]; within a token the order is (channel, row, column).

    Raises:
        ValueError: If h or w is odd.
    """
    batch, channels, height, width = latents.shape
    if height % PATCH or width % PATCH:
        raise ValueError(f"latents must have even height and width to be packed, got {tuple(latents.shape)}.")
    rows, columns = height // PATCH, width // PATCH
    patches = latents.reshape(batch, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, rows * columns, channels * PATCH * PATCH)


def unpack_latents(packed_latents: Tensor, grid: Grid) -> Tensor:
    """Inverse of `pack_latents`.

    Args:
        packed_latents: [B, N, 4 C] with N = grid.num_tokens.
        grid: The token grid.

    Returns:
        [B, C, 2 rows, 2 columns].

    Raises:
        ValueError: If N does not fit the grid.
    """
    batch, num_tokens, width = packed_latents.shape
    if num_tokens != grid.num_tokens:
        raise ValueError(f"packed latents hold {num_tokens} tokens, but the grid {grid.rows} x {grid.columns} has {grid.num_tokens}.")
    channels = width // (PATCH * PATCH)
    patches = packed_latents.reshape(batch, grid.rows, grid.columns, channels, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels, grid.rows * PATCH, grid.columns * PATCH)


def position_ids(grid: Grid, column_offset: int = 0, device: torch.device | str | None = None) -> Tensor:
    """RoPE ids (0, row, column + offset) of one picture, [N, 3] float32.

    Float32 whatever the model's dtype: in bfloat16 columns collide beyond 256.
    """
    rows = torch.arange(grid.rows, dtype=torch.float32, device=device)
    columns = torch.arange(grid.columns, dtype=torch.float32, device=device) + column_offset
    row_ids, column_ids = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(row_ids), row_ids, column_ids], dim=-1).reshape(-1, 3)


def reference_position_ids(grid: Grid, num_references: int, device: torch.device | str | None = None) -> Tensor:
    """RoPE ids of all references in their one sequence, [K * N_ref, 3] float32: reference k (from 0) stands (k + 1) widths left."""
    ids = [position_ids(grid, -(k + 1) * grid.columns, device) for k in range(num_references)]
    return torch.cat(ids) if ids else torch.zeros(0, 3, device=device)


def text_position_ids(length: int, device: torch.device | str | None = None) -> Tensor:
    """RoPE ids of the text tokens: all zero, [length, 3] float32."""
    return torch.zeros(length, 3, device=device)
