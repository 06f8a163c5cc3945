"""How good matches are where nobody knows the truth: figures of points alone, each in [0, 1], higher is better.

None of them proves that points are right: a part may be matched to another one in good order. Somebody has to look at some.
"""

import numpy as np
import torch
from torch import Tensor

from mosaic.method.grids import Grid

FEWEST_POINTS = 16  # of which coherence is told: distances of fewer are in order by chance too often
MOST_POINTS = 128  # that are compared pair by pair; of more, so many are drawn
PARTS = Grid(8, 8)  # of a picture, for coverage: points on coarse and fine grids then cover as much


def coherence(pairs: Tensor, reference_grid: Grid, target_grid: Grid) -> float | None:
    """How far neighbours in the reference stay neighbours in the target, and distant points distant.

    Spearman's rank correlation between the distances of all pairs of points in the reference and those in the target; 0 where it is
    negative. A subject that is turned, mirrored, scaled or bent keeps it near 1. Points matched at random, or all to one cell, give 0.

    Args:
        pairs: Int [P, 2] of (u, v).
        reference_grid: Grid of u.
        target_grid: Grid of v.

    Returns:
        In [0, 1]; None for fewer than `FEWEST_POINTS` points.
    """
    if len(pairs) < FEWEST_POINTS:
        return None
    # Drawn without regard to the order of the points, which follows rows of cells.
    chosen = pairs[torch.from_numpy(np.random.default_rng(0).permutation(len(pairs))[:MOST_POINTS])].numpy()
    return max(0.0, rank_correlation(_distances(chosen[:, 0], reference_grid), _distances(chosen[:, 1], target_grid)))


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation of two series, [N] each, equal values sharing the mean of their ranks; 0 where one is constant."""
    ranks = []
    for values in (first, second):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        rank = (np.cumsum(counts) - (counts - 1) / 2)[place]
        ranks.append(rank - rank.mean())
    scale = float(np.sqrt(np.square(ranks[0]).sum() * np.square(ranks[1]).sum()))
    return float(ranks[0] @ ranks[1]) / scale if scale else 0.0


def coverage(cells: Tensor, subject: Tensor, grid: Grid) -> float | None:
    """Share of a subject that has points: of the parts of the picture, 8 x 8 of them, that show the subject, those with a point.

    Args:
        cells: Int [P], the points' cells.
        subject: Bool [N], the cells that show the subject.
        grid: Grid of both; one that is coarser than 8 x 8 has as many parts as cells.

    Returns:
        In [0, 1]; None where there is no subject.
    """
    parts = Grid(min(PARTS.rows, grid.rows), min(PARTS.columns, grid.columns))
    cell = torch.arange(grid.num_tokens)
    part = cell // grid.columns * parts.rows // grid.rows * parts.columns + cell % grid.columns * parts.columns // grid.columns
    shown, touched = (torch.zeros(parts.num_tokens, dtype=torch.bool) for _ in range(2))
    shown[part[subject]] = touched[part[cells.long()]] = True
    return (touched & shown).sum().item() / shown.sum().item() if shown.any() else None


def agreement(first: Tensor, second: Tensor, reference_grid: Grid, tolerance: int = 1) -> float | None:
    """Share of the target cells matched in two ways whose reference cells agree.

    Args:
        first: Int [P, 2] of (u, v), v unique.
        second: Int [Q, 2] on the same grids, v unique.
        reference_grid: Grid of u.
        tolerance: Cells (Chebyshev) by which u may differ.

    Returns:
        In [0, 1]; None where no target cell is matched in both.
    """
    _, one, other = np.intersect1d(first[:, 1].numpy(), second[:, 1].numpy(), return_indices=True)
    steps = _positions(first[one, 0].numpy(), reference_grid) - _positions(second[other, 0].numpy(), reference_grid)
    return float((np.abs(steps).max(axis=1) <= tolerance).mean()) if len(one) else None


def _positions(cells: np.ndarray, grid: Grid) -> np.ndarray:
    """int64 [P, 2] of (row, column)."""
    return np.stack([cells // grid.columns, cells % grid.columns], axis=1).astype(np.int64)


def _distances(cells: np.ndarray, grid: Grid) -> np.ndarray:
    """Squared distances of all pairs of cells, int64 [P (P - 1) / 2]: whole numbers, so that equal ones are equal."""
    positions = _positions(cells, grid)
    one, other = np.triu_indices(len(cells), 1)
    return np.square(positions[one] - positions[other]).sum(axis=1)
