"""References with what was found of them: the best for each, or one for each that nobody else has."""

import numpy as np
from scipy.optimize import linear_sum_assignment


def best(similarities: np.ndarray) -> list[float]:
    """For each reference its largest similarity of [references, found]; 0 where nothing was found (NaN or no column)."""
    return [float(np.nanmax(row)) if row.size and not np.isnan(row).all() else 0.0 for row in similarities]


def assigned(similarities: np.ndarray) -> list[float]:
    """For each reference the similarity of what it is given of [references, found], nothing to two of them, the sum as large as can be.

    References that are given nothing, or nothing that was found for them (NaN), have 0.
    """
    known = np.nan_to_num(similarities)
    values = [0.0] * len(known)
    for reference, found in zip(*linear_sum_assignment(known, maximize=True), strict=True):
        values[reference] = float(known[reference, found])
    return values
