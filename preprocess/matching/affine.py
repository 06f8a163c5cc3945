"""Matches that lie as a whole subject does: those that follow one affine map from the target to the reference."""

import numpy as np
import torch
from torch import Tensor

from mosaic.method.grids import Grid
from preprocess.matching.matching import NO_MATCH, Match

FEWEST = 12  # matches; any three follow some map, and of few more too many do
TRIALS = 300  # maps through three matches each; with a fifth of all right, two or three of these are right
STRETCH = 3.0  # by which a map may make a subject longer, shorter or narrower than the spread of its matched cells says
ROUNDS = 3  # of fitting the map to the matches that follow it


def follows_affine(match: Match, target_grid: Grid, reference_grid: Grid, radius: int) -> Tensor:
    """Which target cells are sent where the affine map sends them that most of the matches follow (RANSAC).

    Right matches of a subject that is moved, turned, scaled, mirrored or seen from a little to the side lie near one such map, wrong ones
    anywhere. The map is found from triples of matches, drawn alike for equal matches, and then fitted to those that follow it. Maps that
    squeeze the subject are left out: a reference cell that attracts many matches would have them all follow.

    Args:
        match: Of all cells that take part.
        target_grid: Grid of v.
        reference_grid: Grid of u.
        radius: Cells (Chebyshev) by which a match may miss the map.

    Returns:
        bool [N_tgt]; nothing where fewer than `FEWEST` cells are matched, or no map will do.
    """
    found = (match.index != NO_MATCH).nonzero()[:, 0]
    result = torch.zeros_like(match.index, dtype=torch.bool)
    if len(found) < FEWEST:
        return result
    source, image = _positions(found, target_grid), _positions(match.index[found], reference_grid)
    spread = _spread(_positions((match.backward != NO_MATCH).nonzero()[:, 0], reference_grid)) / _spread(source)
    points = np.concatenate([source, np.ones((len(source), 1))], axis=1)  # the third coordinate carries the shift
    triples = np.random.default_rng(0).random((TRIALS, len(points))).argpartition(3, axis=1)[:, :3]
    triples = triples[np.abs(np.linalg.det(points[triples])) > 0.5]  # of whole numbers: 0 on a line
    maps = np.linalg.solve(points[triples], image[triples])  # (M, 3, 2)
    stretch = np.linalg.svd(maps[:, :2], compute_uv=False) / spread
    maps = maps[(stretch[:, 1] >= 1 / STRETCH) & (stretch[:, 0] <= STRETCH)]
    if not len(maps):
        return result
    followers = [_followers(points, image, one, radius) for one in maps]
    best = max(followers, key=np.count_nonzero)
    for _ in range(ROUNDS):
        best = _followers(points, image, np.linalg.lstsq(points[best], image[best], rcond=None)[0], radius)
    result[found[torch.from_numpy(best).to(found.device)]] = True
    return result


def _followers(points: np.ndarray, image: np.ndarray, map_: np.ndarray, radius: int) -> np.ndarray:
    return np.abs(points @ map_ - image).max(axis=1) <= radius


def _positions(cells: Tensor, grid: Grid) -> np.ndarray:
    """Cells as float64 [N, 2] of (row, column)."""
    return np.stack(np.divmod(cells.cpu().numpy(), grid.columns), axis=1).astype(float)


def _spread(positions: np.ndarray) -> float:
    """Root mean square distance from the middle."""
    return float(np.sqrt(np.square(positions - positions.mean(axis=0)).sum(axis=1).mean())) or 1.0
