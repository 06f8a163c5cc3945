"""The pocket bench's numbers: scores by number of subjects, how far the arms are apart, and what the judge says to them."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from mosaic.evaluation.records import Key, Records
from mosaic.evaluation.reduction import Mean, block_mean
from mosaic.images import load_image, to_rgb
from scripts.bench import pocket_data as data
from scripts.pocket.evaluation import identified
from scripts.pocket.judge import load_judge

ARMS = {
    "real": "real renderings",
    "adapter": "adapter",
    "other": "adapter, references of others",
    "base": "base without references",
}
METRICS = {"clip_i": "CLIP-I", "dino": "DINO", "clip_t": "CLIP-T", "identification": "identification by the judge"}
OF_LOOKS = ("clip_i", "dino")  # what must tell the arms apart; prompts do not name looks
GENERATED = ("adapter", "other", "base")

Values = dict[str, dict[str, dict[Key, float]]]  # by arm and metric


class Correlation(NamedTuple):
    """Spearman's rank correlation over cases, of a metric with the share of subjects that the judge identifies."""

    value: float
    p_value: float
    num_cases: int


def read_values(folder: data.Folder) -> Values:
    """All values of all arms, the judge's in percent among them."""
    judge, found = load_judge(), {}
    for arm in ARMS:
        values: defaultdict[str, dict[Key, float]] = defaultdict(dict)
        for name, items in folder.lists.items():
            for key, record in Records(folder.scores(arm, name)).known.items():
                values[key.metric][key] = record.value
            pictures = [to_rgb(load_image(path)) for path in folder.pictures(arm, name)]
            for item, hits in zip(items, identified(judge, pictures, [data.scene_of(item) for item in items]), strict=True):
                for subject, hit in zip(item.subjects, hits, strict=True):
                    values["identification"][Key("identification", f"{block_of(item)}: {item.prompt}", 0, subject)] = 100.0 * hit
        found[arm] = dict(values)
    return found


def block_of(item: data.Item) -> str:
    """The name of a case's block."""
    return "+".join(item.subjects)


def _block(key: Key) -> str:
    return key.case.partition(": ")[0]


def of_number(values: Mapping[Key, float], num_subjects: int) -> dict[Key, float]:
    """The values of cases of so many subjects."""
    return {key: value for key, value in values.items() if _block(key).count("+") + 1 == num_subjects}


def score(values: Values, arm: str, metric: str, num_subjects: int) -> Mean:
    """An arm's mean with its interval over blocks."""
    return block_mean(of_number(values[arm][metric], num_subjects), _block)


def apart(values: Values, better: str, worse: str, metric: str, num_subjects: int) -> Mean:
    """How much an arm is above another one, with the interval of that difference, case by case."""
    one, other = (of_number(values[arm][metric], num_subjects) for arm in (better, worse))
    return block_mean({key: one[key] - other[key] for key in one}, _block)


def correlation(values: Values, metric: str, arms: Iterable[str], num_subjects: int | None = None) -> Correlation:
    """How a metric of looks goes with the judge's identification over the cases of some arms."""
    pairs = []
    for arm in arms:
        both: list[dict[str, float]] = []
        for name in (metric, "identification"):
            found = values[arm][name] if num_subjects is None else of_number(values[arm][name], num_subjects)
            by_case: defaultdict[str, list[float]] = defaultdict(list)
            for key, value in found.items():
                by_case[key.case].append(value)
            both.append({case: float(np.mean(of_case)) for case, of_case in by_case.items()})
        pairs += [(value, both[1][case]) for case, value in both[0].items()]
    if len({right for _, right in pairs}) < 2 or len(pairs) < 3:  # the judge says the same of all: there is no order
        return Correlation(float("nan"), float("nan"), len(pairs))
    result = stats.spearmanr(*zip(*pairs, strict=True))
    return Correlation(float(result.statistic), float(result.pvalue), len(pairs))


def numbers_of_subjects(values: Values) -> list[int]:
    """The numbers of subjects that there are cases of."""
    return sorted({_block(key).count("+") + 1 for key in values["real"]["clip_i"]})


def summary(values: Values) -> dict[str, Any]:
    """All numbers of the page; differences are between each arm and the next one."""
    ks, arms = numbers_of_subjects(values), list(ARMS)
    steps = list(itertools.pairwise(arms))
    scores = {metric: {str(k): {arm: score(values, arm, metric, k)._asdict() for arm in arms} for k in ks} for metric in METRICS}
    differences = {
        metric: {str(k): {f"{a} - {b}": apart(values, a, b, metric, k)._asdict() for a, b in steps} for k in ks} for metric in METRICS
    }
    found: list[tuple[str, tuple[str, ...], int | None]] = [("generated", GENERATED, None), ("adapter", ("adapter",), None)]
    found += [(f"generated, K = {k}", GENERATED, k) for k in ks]
    correlations = {metric: {name: correlation(values, metric, of_arms, k)._asdict() for name, of_arms, k in found} for metric in OF_LOOKS}
    kept = [one for metric in OF_LOOKS for of_k in differences[metric].values() for one in of_k.values()]
    return {
        "scores": scores,
        "differences": differences,
        "correlations": correlations,
        "ordering_holds": all(one["value"] > 0 for one in kept),
        "intervals_above_zero": sum(one["low"] is not None and one["low"] > 0 for one in kept),
        "intervals": len(kept),
    }
