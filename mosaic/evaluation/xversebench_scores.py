"""XVerseBench's scores: DPG, ID-Sim, IP-Sim, AES and their mean over all values, as XVerse's scripts take them, and others beside them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from mosaic.evaluation.entries import Entry
from mosaic.evaluation.records import Key
from mosaic.evaluation.reduction import case_mean, interval_of_average
from mosaic.evaluation.xversebench import group_name

METRICS = ("dpg", "id_sim", "ip_sim", "aes")
AVERAGES = {
    "avg": METRICS,
    "avg_alternative": ("dpg_cascading", "id_sim_assigned", "ip_sim_assigned", "aes_picture"),
}
"""AVG, and the same of what is measured beside: no credit for what hangs on an absent subject, no face or instance for two references,
aesthetics of single pictures."""


def reduce(values: Mapping[str, Mapping[Key, float]], entries: Sequence[Entry]) -> dict[str, Any]:
    """Scores in percent.

    Args:
        values: By metric the values of all pictures.
        entries: The pictures.

    Returns:
        By metric the mean over all its values, such as those of every picture and human reference of ID-Sim, and the averages of four;
        with "intervals" [low, high] over cases, "num_values", and by metric "per_group" means over cases of the same kinds of subjects.
        A metric without values, such as ID-Sim where there are no humans, has none, and so has its average.
    """
    groups = {entry.case: group_name(entry.subjects) for entry in entries}
    scores: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {"intervals": {}, "num_values": {}, "per_group": {}}
    for metric, found in values.items():
        mean = case_mean(found)
        scores[metric] = mean.value
        parts["intervals"][metric] = [mean.low, mean.high]
        parts["num_values"][metric] = mean.num_values
        by_group: defaultdict[str, dict[Key, float]] = defaultdict(dict)
        for key, value in found.items():
            by_group[groups[key.case]][key] = value
        parts["per_group"][metric] = {group: sum(of_group.values()) / len(of_group) for group, of_group in by_group.items()}
    for name, metrics in AVERAGES.items():
        if all(metric in scores for metric in metrics):
            scores[name] = sum(scores[metric] for metric in metrics) / len(metrics)
            parts["intervals"][name] = list(interval_of_average([values[metric] for metric in metrics]))
    return {**scores, **parts}
