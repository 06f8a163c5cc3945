"""A data set of the multi-reference format in its repository form, for the folder form: pictures keep their bytes, splits their names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mosaic.data import Manifest, ReferenceRecord, SampleRecord
from mosaic.files import parse_json, shown
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
    target, references = manifest.read_target(row), []
    for k, (entry, stored) in enumerate(zip(row.references, values["references"], strict=True)):
        place = f"{row.place}.references[{k}]"
        mask = manifest.read_mask(row, k, target)
        references.append(
            ReferenceRecord(
                manifest.folder.read(entry.image, f"{place}.image"),
                entry.phrase,
                None if points is None else points[k].numpy(),
                mask,
                None if stored.get("grid") is None else entry.grid,
                _from_json(stored.get("scores"), f"{place}.scores"),
                stored.get("kind"),
            )
        )
    metadata, scores = _from_json(row.metadata, f"{row.place}.metadata"), _from_json(values.get("scores"), f"{row.place}.scores")
    picture = manifest.folder.read(row.target, f"{row.place}.target")
    return SampleRecord(row.id, row.split, row.prompt, picture, references, row.reference_grid, row.target_grid, metadata, scores)


def _from_json(text: str | None, place: str) -> dict[str, Any]:
    """A JSON object of a column; none where it is empty.

    Raises:
        ValueError: It is no JSON object.
    """
    values = parse_json(text, place) if text else {}
    if not isinstance(values, dict):
        raise ValueError(f"{place}: must be a JSON object, got {shown(values)}.")
    return values
