"""Samples of SemAlign-MS-Subjects200K as records of the multi-reference format, on the full 64 x 64 grid of their points."""

import logging
from collections.abc import Iterator

import numpy as np
from PIL import Image

from mosaic.data import ReferenceRecord, SampleRecord, SemAlignDataset
from mosaic.data.semalign_points import FIELD_GRID, MASK_THRESHOLD, consensus_points
from mosaic.images import to_rgb

logger = logging.getLogger(__name__)
SOURCE = "SemAlign-MS-Subjects200K"


def semalign_records(dataset: SemAlignDataset, split: str) -> Iterator[SampleRecord]:
    """Go through a data set, one record at a time.

    Pictures are the 512 px panels as they are stored; the mask is that of the subject in the target. Points are where DIFT and GeoAware
    agree inside the mask, on the 64 x 64 grid: a reader that reduces them by majority gets what `SemAlignDataset` gives with "vote". Where
    mask or coordinates are missing, the points are None, which is a sample that is not matched yet, and `metadata["missing"]` says what is
    missing. Of rows with one id, which share panel and captions, the first is taken; the others are counted in a warning at the end.

    Args:
        dataset: The data set, opened with the split that is wanted; its sizes and its downsampling have no effect.
        split: Name of the split in the records.

    Yields:
        Records with K = 1, both grids 64 x 64, the released id, and in `metadata` where the sample comes from.

    Raises:
        ValueError: A row, mask or coordinate file is damaged.
    """
    seen: set[str] = set()
    for index in range(len(dataset)):
        identifier = dataset.sample_id(index)
        if identifier not in seen:
            seen.add(identifier)
            yield _record(dataset, index, split)
    if len(seen) < len(dataset):
        logger.warning(
            "%s: left out %d of %d rows, whose ids others have before them.", dataset.root, len(dataset) - len(seen), len(dataset)
        )


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
    points = None if found.missing else consensus_points(found.dift, found.geoaware, found.mask).numpy()
    mask = None if found.mask is None else _mask_pixels(found.mask, target.size)
    return SampleRecord(
        id=dataset.sample_id(index),
        split=split,
        prompt=row.caption,
        target=to_rgb(target),
        references=[ReferenceRecord(to_rgb(reference), row.item, points, mask)],
        reference_grid=tuple(FIELD_GRID),
        target_grid=tuple(FIELD_GRID),
        metadata=metadata,
    )


def _mask_pixels(mask: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """uint8 [height, width] of 0 and 1 over the target's frame; size is (width, height)."""
    resized = mask.convert("L").resize(size, Image.Resampling.NEAREST)
    return (np.asarray(resized) > MASK_THRESHOLD).astype(np.uint8)
