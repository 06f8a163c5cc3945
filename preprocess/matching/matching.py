"""Correspondences between two feature maps: nearest neighbours, filters, consensus, sub-cell positions. Pure functions of tensors.

A feature map is [C, rows, columns]; cells are numbered row * columns + column. Grids may be of any shape, and the two sides may differ.
Matching runs from the target to the reference (data fact A7): every target cell v gets its nearest reference cell u.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic.method.grids import Grid

NO_MATCH = -1
CHUNK_SIZE = 1024
"""Target cells whose similarities are held at a time: 64 MiB of float32 against a 128 x 128 reference."""
MARGIN_RADIUS = 1
"""Cells around the nearest one that are no rivals of it, since neighbouring cells look alike."""

Score = Literal["cosine", "dot"]


@dataclass(frozen=True)
class Match:
    """Nearest neighbours of a target and a reference in each other.

    Similarities are cosines whichever score chose the neighbours, so that a threshold has one meaning. Cells outside a mask have the index
    -1 and minus infinity elsewhere.

    Attributes:
        index: int64 [N_tgt], the reference cell nearest to each target cell; ties to the lowest.
        similarity: float32 [N_tgt], its cosine.
        margin: float32 [N_tgt], how much the cosine exceeds that of the best cell which is no neighbour of `index` (Chebyshev distance
            greater than `MARGIN_RADIUS`); infinity where there is no such cell.
        backward: int64 [N_ref], the target cell nearest to each reference cell; ties to the lowest.
    """

    index: Tensor
    similarity: Tensor
    margin: Tensor
    backward: Tensor

    def to(self, device: torch.device | str) -> "Match":
        """The same match on another device."""
        return Match(*(tensor.to(device) for tensor in (self.index, self.similarity, self.margin, self.backward)))


def match_features(
    target: Tensor,
    reference: Tensor,
    *,
    target_mask: Tensor | None = None,
    reference_mask: Tensor | None = None,
    score: Score = "cosine",
    chunk_size: int = CHUNK_SIZE,
) -> Match:
    """Find the nearest reference cell of every target cell, and the nearest target cell of every reference cell.

    The N_tgt x N_ref similarities are computed for `chunk_size` target cells at a time and never kept.

    Args:
        target: Float [C, rows, columns].
        reference: Float [C, rows, columns], on the same device; its grid may differ.
        target_mask: Bool [N_tgt] or [rows, columns], False where a cell takes no part; None for all True.
        reference_mask: Bool [N_ref] or [rows, columns], False where a cell takes no part; None for all True.
        score: What decides: "cosine", or "dot", the raw dot product of the released DIFT files (data fact A7). Vectors of large norm
            attract dot products, so that a map need not even match itself; it is for comparison with released files only.
        chunk_size: Target cells per step.

    Returns:
        Indices and similarities, on the device of the features.

    Raises:
        ValueError: Shapes or masks do not fit, or a feature is not finite.
    """
    _check_maps(target, reference)
    if score not in ("cosine", "dot"):
        raise ValueError(f'score must be "cosine" or "dot", got "{score}".')
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    grid = Grid(*reference.shape[1:])
    rows, columns = _chosen(target_mask, target, "target_mask"), _chosen(reference_mask, reference, "reference_mask")
    target_cells, target_norms = _cells(target, score)
    candidates, norms = _cells(reference, score)
    candidates, norms, neighbours = candidates[columns], norms[columns], _neighbours(columns, grid)
    index, backward = (torch.full((feature[0].numel(),), NO_MATCH, device=feature.device) for feature in (target, reference))
    similarity = torch.full(index.shape, -torch.inf, device=index.device)
    margin, best = similarity.clone(), torch.full(columns.shape, -torch.inf, device=index.device)
    for part in rows.split(chunk_size) if len(rows) and len(columns) else ():
        scores = target_cells[part] @ candidates.T
        value, row = scores.max(dim=0)
        better = value > best  # strictly, so that ties stay with the lowest target cell
        backward[columns[better]], best = part[row[better]], torch.maximum(best, value)
        value, nearest = scores.max(dim=1)
        index[part], similarity[part] = columns[nearest], value / (target_norms[part] * norms[nearest])
        rival, other = scores.scatter_(1, neighbours[nearest], -torch.inf).max(dim=1)
        margin[part] = similarity[part] - rival / (target_norms[part] * norms[other])
    return Match(index, similarity, margin, backward)


def soft_argmax(
    target: Tensor,
    reference: Tensor,
    index: Tensor,
    *,
    reference_mask: Tensor | None = None,
    window: int = 7,
    temperature: float = 0.02,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Refine matches below the cell: the expected position in a window around the nearest cell (data fact B2, end).

    softmax(cosine / temperature) over the (2 window + 1)^2 cells around `index`. Cells outside the window or the mask have no weight at all
    (some published code gives them the similarity 0, which draws the expectation towards the middle of the picture).

    Args:
        target: Float [C, rows, columns].
        reference: Float [C, rows, columns].
        index: int64 [N_tgt], nearest reference cells as in `Match`, found with the same mask.
        reference_mask: Bool [N_ref] or [rows, columns], False where a cell takes no part; None for all True.
        window: Half the window's side in cells; 0 returns the cell itself.
        temperature: Of the softmax, positive.
        chunk_size: Target cells per step.

    Returns:
        float64 [N_tgt, 2], row and column on the reference grid, where whole numbers are centres of cells; NaN where there is no match.

    Raises:
        ValueError: Shapes do not fit, or `window` or `temperature` is out of range.
    """
    _check_maps(target, reference)
    if window < 0 or not temperature > 0:
        raise ValueError(f"window must be at least 0 and temperature positive, got {window} and {temperature}.")
    grid = Grid(*reference.shape[1:])
    target_cells, cells = _cells(target, "cosine")[0], _cells(reference, "cosine")[0]
    allowed = torch.zeros(grid.num_tokens, dtype=torch.bool, device=index.device)
    allowed[_chosen(reference_mask, reference, "reference_mask")] = True
    steps = torch.arange(-window, window + 1, device=index.device)
    row_steps, column_steps = (step.reshape(-1) for step in torch.meshgrid(steps, steps, indexing="ij"))
    positions = torch.full((len(index), 2), torch.nan, dtype=torch.float64, device=index.device)
    for part in (index != NO_MATCH).nonzero()[:, 0].split(chunk_size):
        row = torch.div(index[part], grid.columns, rounding_mode="floor")[:, None] + row_steps
        column = (index[part] % grid.columns)[:, None] + column_steps
        inside = (row >= 0) & (row < grid.rows) & (column >= 0) & (column < grid.columns)
        cell = torch.where(inside, row * grid.columns + column, 0)
        near = (target_cells[part] @ cells.T).gather(1, cell).double()
        weights = near.masked_fill(~(inside & allowed[cell]), -torch.inf).div(temperature).softmax(dim=1)
        positions[part] = torch.stack([(weights * row).sum(dim=1), (weights * column).sum(dim=1)], dim=1)
    return positions


def rounded_cells(positions: Tensor, grid: Grid) -> Tensor:
    """Cells in which sub-cell positions lie.

    Args:
        positions: float [N, 2] of (row, column), NaN for none.
        grid: The positions' grid.

    Returns:
        int64 [N]; -1 for none.
    """
    row, column = (positions.nan_to_num() + 0.5).floor().long().unbind(1)
    return torch.where(positions.isnan().any(dim=1), NO_MATCH, row * grid.columns + column)


def chebyshev(first: Tensor, second: Tensor, grid: Grid) -> Tensor:
    """Distance of cells as a king walks: the larger of the differences of rows and columns. int64, shapes broadcast."""
    rows = torch.div(first, grid.columns, rounding_mode="floor") - torch.div(second, grid.columns, rounding_mode="floor")
    return torch.maximum(rows.abs(), (first % grid.columns - second % grid.columns).abs())


def is_cyclic(match: Match, target_grid: Grid, radius: int) -> Tensor:
    """Which target cells come back to themselves: the target cell nearest to their nearest reference cell is at most `radius` cells away.

    Radius 0 asks for mutual nearest neighbours; each reference cell then has at most one target cell.

    Returns:
        bool [N_tgt].
    """
    found = (match.index != NO_MATCH).nonzero()[:, 0]
    result = torch.zeros_like(match.index, dtype=torch.bool)
    result[found] = chebyshev(match.backward[match.index[found]], found, target_grid) <= radius
    return result


def agree(indices: Sequence[Tensor], reference_grid: Grid, tolerance: int) -> Tensor:
    """Consensus: which target cells are sent by all matchers to reference cells that lie, pair by pair, within `tolerance` (Chebyshev).

    Tolerance 0 is the release's exact equality (data fact A8).

    Args:
        indices: Per matcher int64 [N_tgt], -1 for none.
        reference_grid: Grid of the indices.
        tolerance: In cells.

    Returns:
        bool [N_tgt]; with a single matcher, where it has a match.
    """
    result = torch.stack(list(indices)).ne(NO_MATCH).all(dim=0)
    for number, first in enumerate(indices):
        for second in indices[number + 1 :]:
            result &= chebyshev(first, second, reference_grid) <= tolerance
    return result


def points_from_index(index: Tensor, keep: Tensor) -> Tensor:
    """int64 [P, 2] of (u, v) for the target cells in `keep`, sorted by v."""
    v = keep.nonzero()[:, 0]
    return torch.stack([index[v], v], dim=1)


def best_per_reference_cell(points: Tensor, similarity: Tensor) -> Tensor:
    """Make u unique: of the points of one reference cell the most similar stays, ties to the lowest v.

    Args:
        points: int64 [P, 2] of (u, v).
        similarity: float [P].

    Returns:
        bool [P]: the points that stay.
    """
    order = points[:, 1].argsort(stable=True)
    order = order[similarity[order].argsort(descending=True, stable=True)]
    order = order[points[order, 0].argsort(stable=True)]
    u = points[order, 0]
    first = torch.ones_like(u, dtype=torch.bool)
    first[1:] = u[1:] != u[:-1]
    return torch.zeros_like(first).index_fill_(0, order[first], True)


def resize_features(features: Tensor, grid: Grid) -> Tensor:
    """Features [C, rows, columns] on another grid, bilinearly (averaging where the grid becomes coarser); unchanged on the same grid."""
    if features.shape[1:] == tuple(grid):
        return features
    return F.interpolate(features[None].float(), tuple(grid), mode="bilinear", antialias=True)[0]


def _check_maps(target: Tensor, reference: Tensor) -> None:
    """Raise ValueError unless both are finite maps [C, rows, columns] of one C."""
    for name, features in (("target", target), ("reference", reference)):
        if features.ndim != 3 or not features.is_floating_point() or not features.numel():
            raise ValueError(f"{name}: a feature map must be float [C, rows, columns], got {features.dtype} {list(features.shape)}.")
        if not features.isfinite().all():
            raise ValueError(f"{name}: the feature map must be finite, but {int((~features.isfinite()).sum())} of its values are not.")
    if len(target) != len(reference):
        raise ValueError(f"both feature maps must have the same number of channels, got {len(target)} and {len(reference)}.")


def _cells(features: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """Cells [N, C] in float32, for cosine of length 1, and what a dot product of them is to be divided by to be a cosine, [N]."""
    cells = features.flatten(1).T.float()
    if score == "dot":
        return cells, cells.norm(dim=1).clamp(min=1e-12)
    return F.normalize(cells, dim=1), torch.ones(len(cells), device=cells.device)


def _chosen(mask: Tensor | None, features: Tensor, name: str) -> Tensor:
    """Cells that take part, int64 ascending."""
    if mask is None:
        return torch.arange(features[0].numel(), device=features.device)
    if mask.dtype != torch.bool or mask.numel() != features[0].numel():
        raise ValueError(
            f"{name}: must be bool with one value per cell of {list(features.shape[1:])}, got {mask.dtype} {list(mask.shape)}."
        )
    return mask.to(features.device).reshape(-1).nonzero()[:, 0]


def _neighbours(cells: Tensor, grid: Grid) -> Tensor:
    """Positions in `cells` of the cells within `MARGIN_RADIUS` of each, int64 [M, 9]; where there is none, the cell's own position."""
    position = torch.full((grid.num_tokens,), NO_MATCH, device=cells.device)
    position[cells] = own = torch.arange(len(cells), device=cells.device)
    steps = torch.arange(-MARGIN_RADIUS, MARGIN_RADIUS + 1, device=cells.device)
    row = torch.div(cells, grid.columns, rounding_mode="floor")[:, None, None] + steps[:, None]
    column = (cells % grid.columns)[:, None, None] + steps
    inside = (row >= 0) & (row < grid.rows) & (column >= 0) & (column < grid.columns)
    found = position[torch.where(inside, row * grid.columns + column, cells[:, None, None])].flatten(1)
    return torch.where(found == NO_MATCH, own[:, None], found)
