"""Means with 95 % intervals: over training seeds, and over training seeds crossed with scenes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom (any table of the distribution).
T_QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448, 2.1314,
    2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452,
)  # fmt: skip
MAX_SEEDS = len(T_QUANTILES) + 1


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: Of the seeds' values; not a number if there are none.
        half: Half of the 95 % interval, t * s / sqrt(n) with n - 1 degrees of freedom; not a number for fewer than two seeds.
        count: Number of seeds, n.
    """

    mean: float
    half: float
    count: int


def over_seeds(values: Sequence[float | None]) -> Estimate:
    """Mean and 95 % interval of one number per seed; None and NaN (a share of nothing) are left out.

    Assumes that the seeds' values are independent and normal; three seeds give t = 4.30, and wide intervals.

    Raises:
        ValueError: More than `MAX_SEEDS` values.
    """
    found = [value for value in values if value is not None and not math.isnan(value)]
    if len(found) > MAX_SEEDS:
        raise ValueError(f"intervals are known for at most {MAX_SEEDS} seeds, got {len(found)}.")
    if not found:
        return Estimate(math.nan, math.nan, 0)
    mean = math.fsum(found) / len(found)
    if len(found) == 1:
        return Estimate(mean, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in found) / (len(found) - 1)
    return Estimate(mean, T_QUANTILES[len(found) - 2] * math.sqrt(variance / len(found)), len(found))


def over_seeds_and_scenes(values: Sequence[Sequence[float]]) -> Estimate:
    """Mean and 95 % interval of one number per seed and scene, where other seeds and other scenes could have been taken.

    Two crossed random factors without repetition, as readers and cases in medicine (Dorfman, Berbaum and Metz 1992; Hillis 2007):
    Var(mean) = (MS_seed + max(MS_scene - MS_rest, 0)) / (S N), with Satterthwaite's degrees of freedom, Var's numerator squared over
    MS_seed^2 / (S - 1). Of a single seed only the choice of scenes is in the interval.

    Args:
        values: S rows of N numbers; scenes that are not a number in any row are left out.

    Returns:
        `count` is S; `half` is not a number for fewer than two scenes, nor where all numbers are equal, which says nothing of their spread.
    """
    if not len(values):
        return Estimate(math.nan, math.nan, 0)
    table = np.array(values, dtype=np.float64)
    table = table[:, ~np.isnan(table).any(axis=0)]
    seeds, scenes = table.shape
    if not scenes:
        return Estimate(math.nan, math.nan, 0)
    mean, by_seed, by_scene = table.mean(), table.mean(axis=1), table.mean(axis=0)
    if scenes < 2:
        return Estimate(float(mean), math.nan, seeds)
    if np.ptp(table) < 1e-12:
        return Estimate(float(mean), math.nan, seeds)
    if seeds == 1:
        return Estimate(float(mean), _quantile(scenes - 1) * math.sqrt(by_scene.var(ddof=1) / scenes), 1)
    ms_seed, ms_scene = scenes * by_seed.var(ddof=1), seeds * by_scene.var(ddof=1)
    rest = table - by_seed[:, None] - by_scene[None] + mean
    ms_rest = (rest**2).sum() / ((seeds - 1) * (scenes - 1))
    spread = ms_seed + max(ms_scene - ms_rest, 0.0)
    freedom = math.inf if ms_seed == 0 else spread**2 / (ms_seed**2 / (seeds - 1))
    return Estimate(float(mean), _quantile(freedom) * math.sqrt(spread / (seeds * scenes)), seeds)


def _quantile(freedom: float) -> float:
    """97.5 % quantile of Student's t; degrees of freedom are rounded down, and from 29 on count as 29, which widens intervals a little."""
    return T_QUANTILES[int(min(max(freedom, 1), len(T_QUANTILES))) - 1]
