"""From two coordinate fields and a mask to the points of a SemAlign sample (data facts A6-A8).

A coordinate field is int64 [4096, 2]: for target cell t = 64 * row + column of a 64 x 64 grid, the (y, x) of the best matching reference
cell on such a grid. A cell is matched where the fields of both matchers, DIFT and GeoAware, name the very same cell and the mask holds it.
There are two ways to coarser training grids:

* "release", the released loader's: both fields are averaged bilinearly and truncated first, and only then compared. Four neighbouring cells
  must (nearly) agree for one coarse cell to survive, and what survives may be a cell that nobody matched.
* "vote": compared on the 64 x 64 grid, then one vote per matched cell. Keeps several times as many points, each of them matched by someone.

On the 64 x 64 grid itself the two are equal.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mosaic.method.correspondence import reduce_points
from mosaic.method.grids import Grid

FIELD_GRID = Grid(64, 64)
FIELD_TOKEN = 16  # px of a cell of that grid in a picture of 1024 px, on which the fields were made
MASK_THRESHOLD = 127.5  # of 255: a mask pixel counts where it is more than half


def corner_cells(mask: Image.Image, side: int, token_size: int) -> Tensor:
    """The cells of a square grid that belong to the subject, by their upper left pixel.

    The mask is resized (nearest) to the picture's size, and pixel (token_size * row, token_size * column) decides for its cell (A6).

    Args:
        mask: Square mask of the target, any size; converted to 8-bit greyscale.
        side: Rows and columns of the grid.
        token_size: Pixels of a cell in the picture.

    Returns:
        bool [side * side], row-major.
    """
    size = side * token_size
    values = np.asarray(mask.convert("L").resize((size, size), Image.Resampling.NEAREST))[::token_size, ::token_size]
    return torch.from_numpy(values > MASK_THRESHOLD).flatten()


def consensus_points(dift: Tensor, geoaware: Tensor, mask: Image.Image) -> Tensor:
    """The matched cells on the 64 x 64 grid.

    The mask's cells are those of a 1024 px picture, the size on which the fields were made, whatever the training size.

    Args:
        dift: int64 [4096, 2] of (y, x), the first field.
        geoaware: The second field.
        mask: Square mask of the target.

    Returns:
        int64 [P, 2] of (u, v) on `FIELD_GRID`, sorted by u, then v. v is unique; u may repeat, since several target cells may have one
        best match.
    """
    v = ((dift == geoaware).all(dim=1) & corner_cells(mask, FIELD_GRID.rows, FIELD_TOKEN)).nonzero()[:, 0]
    u = dift[v, 0] * FIELD_GRID.columns + dift[v, 1]
    order = torch.argsort(u, stable=True)
    return torch.stack([u[order], v[order]], dim=1)


def vote_points(dift: Tensor, geoaware: Tensor, mask: Image.Image, reference_side: int, target_side: int) -> Tensor:
    """Points on the training grids by majority.

    Per coarse target cell the coarse reference cell with most of its votes, one per matched cell of the 64 x 64 grid (ties: the lowest
    index); then per reference cell the target cell with most votes (ties: the lowest): `reduce_points`.

    Args:
        dift: int64 [4096, 2] of (y, x).
        geoaware: The second field.
        mask: Square mask of the target.
        reference_side: Rows and columns of the reference in tokens, a divisor of 64.
        target_side: Rows and columns of the target in tokens, a divisor of 64.

    Returns:
        int64 [P, 2] of (u, v), sorted by u; u and v are unique.
    """
    points = consensus_points(dift, geoaware, mask)
    return reduce_points(points, FIELD_GRID, FIELD_GRID, Grid(reference_side, reference_side), Grid(target_side, target_side))


def release_points(
    dift: Tensor, geoaware: Tensor, mask: Image.Image, reference_side: int, target_side: int, token_size: int = FIELD_TOKEN
) -> Tensor:
    """Points on the training grids as the released loader makes them, bit for bit (A8).

    Args:
        dift: int64 [4096, 2] of (y, x).
        geoaware: The second field.
        mask: Square mask of the target.
        reference_side: Rows and columns of the reference in tokens.
        target_side: Rows and columns of the target in tokens.
        token_size: Pixels of a target token.

    Returns:
        int64 [P, 2] of (u, v), sorted by u; u and v are unique: of the targets of one u, the lowest is kept.
    """
    first, second = (_resized_field(field, target_side) for field in (dift, geoaware))
    v = ((first == second).all(dim=1) & corner_cells(mask, target_side, token_size)).nonzero()[:, 0]
    row, column = (first[v] * reference_side // FIELD_GRID.rows).unbind(1)
    u, position = np.unique((row * reference_side + column).numpy(), return_index=True)  # the position of the first, so of the lowest v
    return torch.stack([torch.from_numpy(u), v[torch.from_numpy(position)]], dim=1)


def _resized_field(field: Tensor, side: int) -> Tensor:
    """A field on side x side target cells, still in units of the 64 x 64 reference grid: bilinear, then truncated."""
    if side == FIELD_GRID.rows:
        return field
    planes = field.float().reshape(1, *FIELD_GRID, 2).permute(0, 3, 1, 2)
    planes = torch.nn.functional.interpolate(planes, size=(side, side), mode="bilinear", align_corners=False)
    return planes.long()[0].flatten(1).T
