"""Frechet distance and intervals over seeds: against closed forms and numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from scripts.pocket.frechet import distance_of_normals, frechet_distance, symmetric_root
from scripts.pocket.judge import Judge, JudgeConfig
from scripts.pocket.statistics import T_QUANTILES, over_seeds, over_seeds_and_scenes


def random_covariance(size: int, seed: int) -> torch.Tensor:
    factor = torch.randn(size, size + 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T / size


def test_equal_sets_have_no_distance_and_a_shift_its_square() -> None:
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    shift = torch.tensor([3.0, 0, 0, -4.0, 0, 0])
    assert frechet_distance(features, features + shift) == pytest.approx(25, rel=1e-5)


def test_one_dimension() -> None:
    # N(1, 4) and N(4, 25): (1 - 4)^2 + (2 - 5)^2
    args = (torch.tensor([[value]], dtype=torch.float64) for value in (4.0, 25.0))
    means = (torch.tensor([value], dtype=torch.float64) for value in (1.0, 4.0))
    (c1, c2), (m1, m2) = args, means
    assert distance_of_normals(m1, c1, m2, c2) == pytest.approx(18)
    assert frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [6.0]])) == pytest.approx(4 + 8)  # variances 2 and 18


def test_commuting_covariances() -> None:
    basis = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    first, second = torch.tensor([1.0, 4.0, 9.0, 0.0]).double(), torch.tensor([4.0, 1.0, 0.0, 0.25]).double()
    zero = torch.zeros(4, dtype=torch.float64)
    found = distance_of_normals(zero, basis * first @ basis.T, zero, basis * second @ basis.T)
    assert found == pytest.approx(float((first.sqrt() - second.sqrt()).square().sum()))


def test_any_covariances_against_the_unsymmetric_form() -> None:
    first, second, zero = random_covariance(5, 2), random_covariance(5, 3), torch.zeros(5, dtype=torch.float64)
    naive = first.trace() + second.trace() - 2 * torch.linalg.eigvals(first @ second).real.sqrt().sum()
    assert distance_of_normals(zero, first, zero, second) == pytest.approx(naive.item())
    assert distance_of_normals(zero, second, zero, first) == pytest.approx(naive.item())
    torch.testing.assert_close(symmetric_root(first) @ symmetric_root(first), first)


def test_fewer_pictures_than_features() -> None:
    generator = torch.Generator().manual_seed(4)
    first, second = torch.randn(5, 30, generator=generator), torch.randn(7, 30, generator=generator)
    assert 0 < frechet_distance(first, second) < math.inf
    with pytest.raises(ValueError, match="n, m >= 2"):
        frechet_distance(first[:1], second)


def test_interval_of_three_seeds() -> None:
    found = over_seeds([0.2, 0.4, 0.9])  # mean 0.5, s^2 = (0.09 + 0.01 + 0.16) / 2 = 0.13
    assert (found.mean, found.count) == (pytest.approx(0.5), 3)
    assert found.half == pytest.approx(4.3027 * math.sqrt(0.13 / 3))


def test_interval_of_two_one_and_no_seeds() -> None:
    assert over_seeds([1.0, 3.0]).half == pytest.approx(12.7062)  # s = sqrt 2, / sqrt 2
    assert over_seeds([0.5, None, math.nan]).count == 1
    assert math.isnan(over_seeds([0.5]).half)
    assert math.isnan(over_seeds([None]).mean)
    with pytest.raises(ValueError, match="at most 30 seeds"):
        over_seeds([0.0] * 31)


def test_interval_over_seeds_and_scenes_by_hand() -> None:
    """Seeds 1, 3 and scenes -1, 0, 1 added up, and a rest of +-0.5 at two scenes."""
    table = [[0.5, 1.0, 1.5], [1.5, 3.0, 4.5]]  # = 2 +- 1 + scene + rest, by hand below
    found = over_seeds_and_scenes(table)
    seeds, scenes = [1.0, 3.0], [1.0, 2.0, 3.0]
    ms_seed, ms_scene, ms_rest = 3 * 2.0, 2 * 1.0, 4 * 0.25 / 2
    assert (sum(seeds) / 2, sum(scenes) / 3, found.mean, found.count) == (2, 2, pytest.approx(2), 2)
    spread = ms_seed + ms_scene - ms_rest
    freedom = int(spread**2 / ms_seed**2)
    assert found.half == pytest.approx(T_QUANTILES[freedom - 1] * math.sqrt(spread / 6))


def test_intervals_of_few_seeds_and_scenes() -> None:
    one = over_seeds_and_scenes([[0.0, 1.0, 2.0, 3.0, math.nan]])  # s^2 = 5/3, 4 scenes
    assert (one.mean, one.half) == (1.5, pytest.approx(3.1824 * math.sqrt(5 / 3 / 4)))
    assert over_seeds_and_scenes([[1.0, 3.0], [1.0, 3.0]]).half == pytest.approx(2.0452 * math.sqrt(4 / 4))  # equal seeds: scenes only
    assert math.isnan(over_seeds_and_scenes([[0.5]]).half)
    assert math.isnan(over_seeds_and_scenes([[0.0, 0.0], [0.0, 0.0]]).half)
    assert math.isnan(over_seeds_and_scenes([[math.nan], [1.0]]).mean)
    assert math.isnan(over_seeds_and_scenes([]).mean)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """2,000 experiments of 4 seeds and 40 scenes with known spreads: about 95 % of the intervals hold 0."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        table = rng.normal(0, 0.05, (4, 1)) + rng.normal(0, 0.2, (1, 40)) + rng.normal(0, 0.4, (4, 40))
        found = over_seeds_and_scenes(table)
        held += abs(found.mean) <= found.half
    assert 0.93 < held / 2000 < 0.99


def test_quantiles_of_t() -> None:
    """The density of Student's t, integrated numerically up to the quantile, gives 97.5 %."""
    for freedom, quantile in enumerate(T_QUANTILES, 1):
        x = torch.linspace(0, quantile, 20_001, dtype=torch.float64)
        log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
        density = math.exp(log_scale) * (1 + x.square() / freedom) ** (-(freedom + 1) / 2)
        assert 0.5 + torch.trapezoid(density, x).item() == pytest.approx(0.975, abs=1e-5)


def test_features_of_the_judge_feed_its_background_head() -> None:
    torch.manual_seed(0)
    judge = Judge(JudgeConfig(fine=8, coarse=16, found=16))
    pictures = torch.rand(3, 3, 64, 64) * 2 - 1
    features = judge.features(pictures)
    assert features.shape == (3, 16)
    torch.testing.assert_close(judge.background(features), judge.verdict(pictures).background)
    assert judge.training
