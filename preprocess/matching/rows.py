"""The pictures of a sample, as matching needs them."""

import numpy as np

from mosaic.data import Manifest, Row
from preprocess.matching.samples import ReferencePicture, SamplePictures

MASK_THRESHOLD = 127  # a mask's pixel counts above the middle (data fact A6)


def read_pictures(manifest: Manifest, row: Row) -> SamplePictures:
    """Read target, references and masks of a sample.

    Raises:
        FileNotFoundError, ValueError: A picture is missing or damaged; the message names row and field.
    """
    references = []
    for k, entry in enumerate(row.references):
        place = f"{row.place}.references[{k}]"
        image = manifest.read_picture(entry.image, f"{place}.image")
        mask = None if entry.mask is None else np.asarray(manifest.read_picture(entry.mask, f"{place}.mask").convert("L")) > MASK_THRESHOLD
        references.append(ReferencePicture(image, entry.grid, mask))
    return SamplePictures(manifest.read_picture(row.target, f"{row.place}.target"), row.target_grid, references)
