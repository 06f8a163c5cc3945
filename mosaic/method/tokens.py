"""Geometry: latents <-> packed tokens, and the RoPE position ids of the three token groups."""

import torch
from torch import Tensor

from mosaic.method.grids import PATCH, Grid

REFERENCE_POSITIONS = ("width", "index")


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


def position_ids(grid: Grid, column_offset: int = 0, device: torch.device | str | None = None, frame: int = 0) -> Tensor:
    """RoPE ids (frame, row, column + offset) of one picture, [N, 3] float32.

    Float32 whatever the model's dtype: in bfloat16 columns collide beyond 256.
    """
    rows = torch.arange(grid.rows, dtype=torch.float32, device=device)
    columns = torch.arange(grid.columns, dtype=torch.float32, device=device) + column_offset
    row_ids, column_ids = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.full_like(row_ids, frame), row_ids, column_ids], dim=-1).reshape(-1, 3)


def reference_position_ids(
    grid: Grid, num_references: int, device: torch.device | str | None = None, reference_position: str = "width"
) -> Tensor:
    """RoPE ids of all references in their one sequence, [K * N_ref, 3] float32.

    Args:
        grid: Of one reference.
        num_references: K.
        device: Where the ids live.
        reference_position: "width": reference k (from 0) stands k + 1 widths left of the target (the paper); "index": in the target's
            place, with k + 1 on the first axis, which text and target have 0 on.
    """
    if reference_position == "index":
        ids = [position_ids(grid, 0, device, frame=k + 1) for k in range(num_references)]
    else:
        # To the left, so that no reference shares a position with the target, however wide that is.
        ids = [position_ids(grid, -(k + 1) * grid.columns, device) for k in range(num_references)]
    return torch.cat(ids) if ids else torch.zeros(0, 3, device=device)


def text_position_ids(length: int, device: torch.device | str | None = None) -> Tensor:
    """RoPE ids of the text tokens: all zero, [length, 3] float32."""
    return torch.zeros(length, 3, device=device)
