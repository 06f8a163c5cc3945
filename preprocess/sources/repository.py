"""A data set of the multi-reference format in its repository form, for the folder form: pictures keep their bytes, splits their names."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mosaic.data import Manifest, ReferenceRecord, SampleRecord
from preprocess.matching.rows import MASK_THRESHOLD
from preprocess.sources.invalid import InvalidSamples


def samples(root: Path, invalid: InvalidSamples) -> Iterator[SampleRecord]:
    """Yield the samples of all splits.

    Args:
        root: A data set on the hub ("user/name"), or a folder; the folder form is read as well.
        invalid: What to do with samples that cannot be read.

    Raises:
        FileNotFoundError, ValueError: There is no such data set, or a sample is invalid and not skipped.
    """
    manifest = Manifest(root, None)
    for index in range(len(manifest)):
        with invalid.at(manifest.place(index)):
            yield _sample(manifest, index)


def _sample(manifest: Manifest, index: int) -> SampleRecord:
    row, values = manifest.row(index), manifest.values(index)
    points = manifest.read_points(row)
    references = []
    for k, (entry, stored) in enumerate(zip(row.references, values["references"], strict=True)):
        place = f"{row.place}.references[{k}]"
        mask = None if entry.mask is None else np.asarray(manifest.read_picture(entry.mask, f"{place}.mask").convert("L")) > MASK_THRESHOLD
        references.append(
            ReferenceRecord(
                manifest.folder.read(entry.image, f"{place}.image"),
                entry.phrase,
                None if points is None else points[k].numpy(),
                mask,
                None if stored.get("grid") is None else entry.grid,
                _from_json(stored.get("scores")),
                stored.get("kind"),
            )
        )
    target = manifest.folder.read(row.target, f"{row.place}.target")
    metadata, scores = _from_json(row.metadata), _from_json(values.get("scores"))
    return SampleRecord(row.id, row.split, row.prompt, target, references, row.reference_grid, row.target_grid, metadata, scores)


def _from_json(text: str | None) -> dict[str, Any]:
    """A JSON object of a column; none where it is empty.

    Raises:
        ValueError: It is no JSON.
    """
    return json.loads(text) if text else {}
