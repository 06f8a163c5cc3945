"""Figures of quality that need no truth, against numbers done by hand, and that they tell right from wrong."""

import numpy as np
import pytest
import torch

from mosaic.data.quality import agreement, coherence, coverage, rank_correlation
from mosaic.method.grids import Grid

REFERENCE, TARGET = Grid(8, 8), Grid(16, 16)
U = torch.arange(64)
V = U // 8 * 2 * 16 + U % 8 * 2  # the same picture, twice as fine


def points(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.stack([u, v], dim=1).int()


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation(np.array([1, 2, 3]), np.array([10, 30, 20])) == pytest.approx(0.5)  # 1 - 6 * 2 / (3 * 8)
    assert rank_correlation(np.array([1, 2, 3, 4]), np.array([9, 7, 5, 3])) == pytest.approx(-1)
    # Ties share a rank: 1.5, 1.5, 3 against 1, 2, 3 gives 1.5 / sqrt(1.5 * 2).
    assert rank_correlation(np.array([4, 4, 9]), np.array([1, 2, 3])) == pytest.approx(1.5 / np.sqrt(3))
    # Ranks 1.5, 1.5, 3, 4: 4.5 / sqrt(4.5 * 5).
    assert rank_correlation(np.array([4, 4, 9, 11]), np.array([1, 2, 3, 4])) == pytest.approx(4.5 / np.sqrt(22.5))
    assert rank_correlation(np.array([5, 5, 5]), np.array([1, 2, 3])) == 0


@pytest.mark.parametrize(
    "v", [V, V.reshape(8, 8).flip(1).flatten(), V.reshape(8, 8).flip(0).flatten(), V.reshape(8, 8).T.flatten()], ids=["same", "mirrored", "turned", "transposed"]
)  # fmt: skip
def test_order_that_is_kept_is_coherent(v: torch.Tensor) -> None:
    assert coherence(points(U, v), REFERENCE, TARGET) == pytest.approx(1)


def test_wrong_points_are_not_coherent() -> None:
    rng = torch.Generator().manual_seed(1)
    shuffled = U[torch.randperm(64, generator=rng)]
    by_chance = [coherence(points(U[torch.randperm(64, generator=rng)], V), REFERENCE, TARGET) for _ in range(10)]
    assert min(by_chance) == 0  # a negative correlation is no order
    half = torch.where(torch.rand(64, generator=rng) < 0.5, shuffled, U)
    assert coherence(points(shuffled, V), REFERENCE, TARGET) < 0.1
    assert 0.1 < coherence(points(half, V), REFERENCE, TARGET) < 0.5
    assert coherence(points(torch.full_like(U, 9), V), REFERENCE, TARGET) == 0
    assert coherence(points(U.flip(0)[:16], V[:16]), REFERENCE, TARGET) == pytest.approx(1)
    assert coherence(points(U[:15], V[:15]), REFERENCE, TARGET) is None


def test_many_points_are_drawn_whatever_their_order() -> None:
    grid = Grid(32, 32)
    u = torch.arange(1024)
    first = coherence(points(u, u), grid, grid)
    assert first == pytest.approx(1)
    wrong = u.clone()
    wrong[512:] = u[512:][
        torch.randperm(512, generator=torch.Generator().manual_seed(0))
    ]  # the lower half, which a head of them would miss
    assert coherence(points(wrong, u), grid, grid) < 0.9


def test_distances_use_rows_and_columns_of_their_own_grid() -> None:
    wide = Grid(4, 16)  # the same 64 cells, read on another grid, have other neighbours
    assert coherence(points(U, V), wide, TARGET) < 0.6


def test_coverage_by_hand() -> None:
    grid = Grid(16, 16)  # parts of 2 x 2 cells
    subject = torch.zeros(256, dtype=torch.bool)
    subject[[0, 1, 16, 2, 40]] = True  # parts (0, 0), (0, 1), (1, 4)
    assert coverage(torch.tensor([17]), subject, grid) == pytest.approx(1 / 3)  # (1, 1) lies in the first part
    assert coverage(torch.tensor([0, 1, 40, 255]), subject, grid) == pytest.approx(2 / 3)  # what lies beside the subject does not count
    assert coverage(torch.tensor([]), subject, grid) == 0
    assert coverage(torch.tensor([0]), subject & False, grid) is None
    small = Grid(2, 3)
    assert coverage(torch.tensor([5]), torch.ones(6, dtype=torch.bool), small) == pytest.approx(1 / 6)


def test_agreement_by_hand() -> None:
    first = points(torch.tensor([0, 9, 20, 40]), torch.tensor([3, 4, 5, 6]))
    second = points(torch.tensor([9, 9, 23, 1]), torch.tensor([3, 4, 5, 7]))
    # v 3: (0, 0) and (1, 1), one apart; v 4: equal; v 5: (2, 4) and (2, 7); v 6 and 7 are matched once.
    assert agreement(first, second, REFERENCE) == pytest.approx(2 / 3)
    assert agreement(first, second, REFERENCE, 0) == pytest.approx(1 / 3)
    assert agreement(first, second, REFERENCE, 3) == 1
    assert agreement(first[:1], second[1:], REFERENCE) is None
