"""Samples of SemAlign-MS-Subjects200K as records of the multi-reference format, on the full 64 x 64 grid of their points."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mosaic.data import ReferenceRecord, SampleRecord, SemAlignDataset
from mosaic.data.semalign.points import FIELD_GRID, MASK_THRESHOLD, consensus_points
from mosaic.images import to_rgb
from preprocess.sources.invalid import InvalidSamples

logger = logging.getLogger(__name__)
SOURCE = "SemAlign-MS-Subjects200K"


def count(root: Path) -> int:
    """Number of samples, for the progress bar."""
    return len(SemAlignDataset(root))


def samples(root: Path, split: str, invalid: InvalidSamples) -> Iterator[SampleRecord]:
    """Go through a data set, one record at a time.

    Pictures are the 512 px panels as they are stored; the mask is that of the subject in the target. Points are where DIFT and GeoAware
    agree inside the mask, on the 64 x 64 grid: a reader that reduces them by majority gets what `SemAlignDataset` gives with "vote". Where
    mask or coordinates are missing, the points are None, which is a sample that is not matched yet, and `metadata["missing"]` says what is
    missing. Of rows with one id, which share panel and captions, the first is taken; the others are counted in a warning at the end.

    Args:
        root: Folder of the data set in its released layout.
        split: Name of the split in the records.
        invalid: What to do with a row, mask or coordinate file that is damaged.

    Yields:
        Records with K = 1, both grids 64 x 64, the released id, and in `metadata` where the sample comes from.

    Raises:
        FileNotFoundError: The data set or a part of it is missing.
        ValueError: It has other columns or archives than the released ones, or a damaged sample that is not skipped.
    """
    dataset, seen, repeated = SemAlignDataset(root), set(), 0
    for index in range(len(dataset)):
        record = None
        with invalid.at(f"{root}, sample {index}"):
            record = None if dataset.sample_id(index) in seen else _record(dataset, index, split)
            repeated += record is None
        if record is not None:
            seen.add(record.id)
            yield record
    if repeated:
        logger.warning("%s: left out %d of %d rows, whose ids others have before them.", root, repeated, len(dataset))


def _record(dataset: SemAlignDataset, index: int, split: str) -> SampleRecord:
    row, target, reference = dataset.stored(index)
    found = dataset.supervision(index)
    metadata = {
        "source": SOURCE,
        "row": dataset.row_number(index),
        "item": row.item,
        "reference_caption": row.reference_caption,
        "matchers": ["dift", "geoaware"],
        "consensus": "equal cells inside the mask",
        "missing": list(found.missing),
    }
    points = None if found.whole is None else consensus_points(*found.whole).numpy()
    mask = None if found.mask is None else _mask_pixels(found.mask, target.size)
    return SampleRecord(
        id=dataset.sample_id(index),
        split=split,
        prompt=row.caption,
        target=to_rgb(target),
        references=[ReferenceRecord(to_rgb(reference), row.item, points, mask)],
        reference_grid=FIELD_GRID,
        target_grid=FIELD_GRID,
        metadata=metadata,
    )


def _mask_pixels(mask: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """uint8 [height, width] of 0 and 1 over the target's frame; size is (width, height)."""
    resized = mask.convert("L").resize(size, Image.Resampling.NEAREST)
    return (np.asarray(resized) > MASK_THRESHOLD).astype(np.uint8)
