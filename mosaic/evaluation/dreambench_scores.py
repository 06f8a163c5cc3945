"""DreamBench's scores: CLIP-I, CLIP-T and DINO over blocks of the same subjects, as UNO takes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from mosaic.evaluation.dreambench import block_name
from mosaic.evaluation.entries import Entry
from mosaic.evaluation.records import Key
from mosaic.evaluation.reduction import block_mean, group_means

METRICS = ("clip_i", "clip_t", "dino")


def reduce(values: Mapping[str, Mapping[Key, float]], entries: Sequence[Entry]) -> dict[str, Any]:
    """Scores in percent.

    Args:
        values: By metric the values of all pictures.
        entries: The pictures.

    Returns:
        By metric the official mean: over the subjects of a picture, the pictures of a block, the blocks of a run, and runs; with
        "intervals" [low, high] over blocks, "plain" means over all pictures at once, and "per_subject" and "per_prompt" means.
    """
    blocks, prompts = {e.case: block_name(e.subjects) for e in entries}, {e.case: e.prompt for e in entries}
    scores: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {"intervals": {}, "plain": {}, "per_subject": {}, "per_prompt": {}}
    for metric, found in values.items():
        mean = block_mean(found, lambda key: blocks[key.case])
        scores[metric] = mean.value
        parts["intervals"][metric] = [mean.low, mean.high]
        parts["plain"][metric] = mean.plain
        parts["per_subject"][metric] = group_means(found, lambda key: key.subject or blocks[key.case])
        parts["per_prompt"][metric] = group_means(found, lambda key: prompts[key.case])
    return {**scores, **parts}
