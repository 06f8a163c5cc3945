"""From records to scores: means in the order in which protocols take them, beside them the plain mean, and intervals."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from mosaic.evaluation.records import Key

RESAMPLES = 9999


class Mean(NamedTuple):
    """A mean with what can be said about it.

    Attributes:
        value: Mean over blocks of each run, then over runs.
        low, high: 95 % interval of it, by a bootstrap over blocks (percentiles); None where there is one block only.
        plain: Mean over all values at once, which differs where blocks are not of one size.
        num_values: How many pictures went into it.
    """

    value: float
    low: float | None
    high: float | None
    plain: float
    num_values: int


def block_mean(values: Mapping[Key, float], block_of: Callable[[Key], Hashable]) -> Mean:
    """Mean of a metric.

    Args:
        values: At least one; values of one picture, one per subject, are averaged first.
        block_of: The block of a value; blocks weigh the same.
    """
    of_picture: defaultdict[tuple[int | None, Hashable, str], list[float]] = defaultdict(list)
    for key, value in values.items():
        of_picture[key.run, block_of(key), key.case].append(value)
    of_block: defaultdict[Hashable, defaultdict[int | None, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (run, block, _), found in of_picture.items():
        of_block[block][run].append(float(np.mean(found)))
    runs = sorted({run for by_run in of_block.values() for run in by_run}, key=lambda run: -1 if run is None else run)
    table = np.array(
        [[np.mean(by_run[run]) if run in by_run else np.nan for run in runs] for by_run in of_block.values()]
    )  # [blocks, runs]
    low, high = interval(table)
    every = [value for found in of_picture.values() for value in found]
    return Mean(float(np.nanmean(np.nanmean(table, axis=0))), low, high, float(np.mean(every)), len(every))


def interval(table: np.ndarray) -> tuple[float | None, float | None]:
    """95 % interval of the mean over blocks, then runs, of a table [blocks, runs]; blocks are drawn with all their runs."""
    if len(table) < 2:
        return None, None
    blocks = np.nanmean(table, axis=1)
    found = stats.bootstrap((blocks,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def case_mean(values: Mapping[Key, float]) -> Mean:
    """Mean over all values at once, with an interval over cases, which are drawn with all their values.

    Args:
        values: At least one.
    """
    mean = float(np.mean(list(values.values())))
    low, high = interval_of_average([values])
    return Mean(mean, low, high, mean, len(values))


def interval_of_average(metrics: Sequence[Mapping[Key, float]]) -> tuple[float | None, float | None]:
    """95 % interval of the average of metrics, each a mean over all its values, by a bootstrap over cases.

    Cases are drawn with all their values of all metrics; those without values of a metric count for the others.
    """
    cases = list(dict.fromkeys(key.case for values in metrics for key in values))
    if len(cases) < 2:
        return None, None
    row = {case: number for number, case in enumerate(cases)}
    sums, counts = np.zeros((2, len(metrics), len(cases)))
    for metric, values in enumerate(metrics):
        for key, value in values.items():
            sums[metric, row[key.case]] += value
            counts[metric, row[key.case]] += 1

    def statistic(drawn: np.ndarray, axis: int) -> np.ndarray:
        of_cases = drawn.astype(np.int64)
        with np.errstate(invalid="ignore"):  # a draw may have no case with a metric's values; such draws are left out
            means = sums[:, of_cases].sum(axis=axis) / counts[:, of_cases].sum(axis=axis)
        return means.mean(axis=0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # that draws are left out
        found = stats.bootstrap(
            (np.arange(len(cases)),),
            statistic,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
            batch=1000,
            vectorized=True,
        )
    low, high = np.nanpercentile(found.bootstrap_distribution, (2.5, 97.5))
    return float(low), float(high)


def group_means(values: Mapping[Key, float], group_of: Callable[[Key], str]) -> dict[str, float]:
    """Mean of the values of each group, in the order in which groups first appear."""
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for key, value in values.items():
        groups[group_of(key)].append(value)
    return {group: float(np.mean(found)) for group, found in groups.items()}


def values_of(records: Sequence[tuple[Key, float]]) -> dict[str, dict[Key, float]]:
    """Values by metric."""
    found: defaultdict[str, dict[Key, float]] = defaultdict(dict)
    for key, value in records:
        found[key.metric][key] = value
    return dict(found)
