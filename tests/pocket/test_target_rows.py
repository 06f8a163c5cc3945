"""Where target tokens look among the references, by hand."""

import pytest
import torch

from mosaic.method.correspondence import batch_points
from mosaic.method.grids import Grid
from scripts.pocket.target_rows import TargetLooks, target_looks


def looks_of(weights: list[float]) -> TargetLooks:
    """Of one point, from token 5 = (1, 2) of the second of two references of 2 x 3 tokens to target token 1."""
    return target_looks(
        torch.tensor(weights)[None, None], batch_points([[torch.zeros(0, 2).long(), torch.tensor([[5, 1]])]], 6, 3, "cpu"), Grid(2, 3)
    )


@pytest.mark.parametrize(
    ("peak", "exact", "near"),
    [(11, 1, 1), (10, 0, 1), (7, 0, 1), (8, 0, 1), (6, 0, 0), (9, 0, 0), (5, 0, 0), (4, 0, 0)],
)
def test_a_peak_by_hand(peak: int, exact: int, near: int) -> None:
    weights = [0.01] * 12
    weights[peak] = 0.3
    own = 0.35 if peak >= 6 else 0.06
    assert looks_of(weights) == pytest.approx((0.41, own / 0.41, exact, near))


def test_the_mean_is_over_points_of_all_samples() -> None:
    points = batch_points([[torch.tensor([[0, 0], [1, 1]])], [torch.tensor([[1, 2]])]], 2, 3, "cpu")
    rows = torch.tensor([[[0.2, 0.1], [0.3, 0.1]], [[0.1, 0.4], [9.0, 9.0]]])  # the last one is padding
    assert target_looks(rows, points, Grid(1, 2)) == pytest.approx(((0.3 + 0.4 + 0.5) / 3, 1, 2 / 3, 1))
