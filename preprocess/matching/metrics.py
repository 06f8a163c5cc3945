"""Measures of matches against exact correspondences: PCK of a matcher, precision and recall of what filters leave."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mosaic.method.grids import Grid

ALPHAS = (0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Truth:
    """The exact correspondences of one target and reference.

    Attributes:
        u: int64 [P], reference cells.
        v: int64 [P], target cells, each at most once.
        grid: Grid of u.
        size: Height and width of the reference in px.
        box_side: Longer side of the subject's bounding box in the reference, px: the unit of PCK thresholds.
    """

    u: Tensor
    v: Tensor
    grid: Grid
    size: tuple[int, int]
    box_side: float

    def errors(self, positions: Tensor) -> Tensor:
        """Distance of predicted positions from the true cells' centres.

        Args:
            positions: float [N_tgt, 2] of (row, column) on `grid`, whole numbers at centres of cells; NaN for none.

        Returns:
            float64 [P], in units of `box_side`; infinity where there is no prediction.
        """
        true = cell_positions(self.u, self.grid)
        cell = torch.tensor([self.size[0] / self.grid.rows, self.size[1] / self.grid.columns], dtype=torch.float64)
        return ((positions[self.v].double() - true) * cell).norm(dim=1).div(self.box_side).nan_to_num(nan=torch.inf)


@dataclass(frozen=True)
class Pck:
    """Percentage of correct keypoints per threshold: averaged over all points, and over pairs of pictures first."""

    per_point: dict[str, float]
    per_pair: dict[str, float]
    num_points: int
    num_pairs: int


@dataclass(frozen=True)
class FilterCounts:
    """What a filter leaves of one or more pairs: kept matches, correct ones among them, and true correspondences."""

    kept: int = 0
    correct: int = 0
    true: int = 0

    def __add__(self, other: "FilterCounts") -> "FilterCounts":
        return FilterCounts(self.kept + other.kept, self.correct + other.correct, self.true + other.true)

    @property
    def precision(self) -> float:
        """Correct ones among the kept; NaN if nothing was kept."""
        return self.correct / self.kept if self.kept else float("nan")

    @property
    def recall(self) -> float:
        """True correspondences that were kept and correct; NaN if there are none."""
        return self.correct / self.true if self.true else float("nan")


def cell_positions(index: Tensor, grid: Grid) -> Tensor:
    """Cells as float64 [N, 2] of (row, column); NaN for -1."""
    positions = torch.stack([torch.div(index, grid.columns, rounding_mode="floor"), index % grid.columns], dim=1).double()
    return positions.masked_fill((index < 0)[:, None], torch.nan)


def pck(errors: Sequence[Tensor], alphas: Sequence[float] = ALPHAS) -> Pck:
    """PCK@alpha: the share of points whose error is at most alpha (inclusive, as in DIFT; data fact E.17).

    Args:
        errors: Per pair float [P] from `Truth.errors`; pairs without points are left out.
        alphas: Thresholds in units of the subject's box.

    Raises:
        ValueError: No pair has points.
    """
    errors = [own for own in errors if len(own)]
    if not errors:
        raise ValueError("PCK needs at least one true correspondence, got none.")
    hits = {f"{alpha:g}": [(own <= alpha).double() for own in errors] for alpha in alphas}
    return Pck(
        per_point={name: float(torch.cat(own).mean()) for name, own in hits.items()},
        per_pair={name: float(np.mean([float(pair.mean()) for pair in own])) for name, own in hits.items()},
        num_points=sum(map(len, errors)),
        num_pairs=len(errors),
    )


def filter_counts(keep: Tensor, positions: Tensor, truth: Truth, alpha: float) -> FilterCounts:
    """Count what a filter leaves of one pair.

    Args:
        keep: bool [N_tgt], matches kept; those on target cells without a true correspondence count as wrong.
        positions: float [N_tgt, 2], as in `Truth.errors`.
        truth: Of the pair.
        alpha: Largest error of a correct match, in units of the subject's box.
    """
    correct = keep[truth.v] & (truth.errors(positions) <= alpha)
    return FilterCounts(int(keep.sum()), int(correct.sum()), len(truth.v))
