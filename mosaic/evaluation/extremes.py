"""The pictures at both ends of each metric: people look before they believe a mean."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mosaic.evaluation.entries import Entry
from mosaic.evaluation.prepared import relative
from mosaic.evaluation.records import Key

SHOWN = 10  # pictures at each end


def extremes(values: Mapping[Key, float], entries: Sequence[Entry], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The pictures of the lowest and of the highest values of a metric.

    Args:
        values: Of the metric; those of a picture's subjects are averaged, those of no single picture left out.
        entries: The pictures.
        folder: At which the paths in the result start.

    Returns:
        "worst", the lowest first, and "best", the highest first: case, run, value, prompt, and the paths "picture" (with its "tile" where
        it lies in a grid) and "references", the first of each subject.
    """
    of_picture: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for key, value in values.items():
        if key.run is not None:
            of_picture[key.case, key.run].append(value)
    found = {(entry.case, entry.run): entry for entry in entries}
    order = sorted(of_picture, key=lambda picture: (float(np.mean(of_picture[picture])), picture))

    def shown(picture: tuple[str, int]) -> dict[str, Any]:
        entry = found[picture]
        return {
            "case": entry.case,
            "run": entry.run,
            "value": float(np.mean(of_picture[picture])),
            "prompt": entry.prompt,
            "picture": relative(entry.picture, folder),
            "tile": entry.tile,
            "references": [relative(subject.references[0], folder) for subject in entry.subjects],
        }

    return {"worst": [shown(one) for one in order[:SHOWN]], "best": [shown(one) for one in reversed(order[-SHOWN:])]}
