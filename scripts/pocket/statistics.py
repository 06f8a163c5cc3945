"""Mean and 95 % interval over training seeds, by Student's t distribution."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
