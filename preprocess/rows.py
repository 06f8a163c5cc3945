"""What matching reads of a data set: rows with masks and grids per reference, and their pictures."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from mosaic.data.manifest import Manifest, checked_path
from mosaic.images import load_image, to_rgb
from mosaic.tokens import Grid
from preprocess.sample_matching import ReferencePicture, SamplePictures


@dataclass(frozen=True)
class ReferenceEntry:
    """One reference of a row: its picture, where it is seen in the target (None: not known), and the grid of u over its own frame."""

    image: str
    mask: str | None
    grid: Grid


@dataclass(frozen=True)
class MatchingRow:
    """The part of a manifest's row that matching needs."""

    place: str
    id: str
    target: str
    references: tuple[ReferenceEntry, ...]
    points: str
    target_grid: Grid


def read_row(manifest: Manifest, index: int) -> MatchingRow:
    """Return one row, its values checked.

    Raises:
        ValueError: As `Manifest.row`, or a mask's path or a reference's own grid is unsound.
    """
    row = manifest.row(index)
    entries = manifest._table["references"][index].as_py()
    references = []
    for k, entry in enumerate(entries):
        place = f"{row.place}.references[{k}]"
        mask, grid = entry.get("mask"), entry.get("grid")
        if grid is not None and (len(grid) != 2 or any(side is None or side < 1 for side in grid)):
            raise ValueError(f"{place}.grid: must be two positive integers, rows and columns, got {grid}.")
        references.append(
            ReferenceEntry(
                image=checked_path(entry["image"], f"{place}.image"),
                mask=None if mask is None else checked_path(mask, f"{place}.mask"),
                grid=row.reference_grid if grid is None else Grid(*grid),
            )
        )
    return MatchingRow(row.place, row.id, row.target, tuple(references), row.points, row.target_grid)


def read_pictures(manifest: Manifest, row: MatchingRow) -> SamplePictures:
    """Read target, references and masks of a sample. Raises as `read_picture`."""
    references = []
    for k, entry in enumerate(row.references):
        place = f"{row.place}.references[{k}]"
        image = read_picture(manifest, entry.image, f"{place}.image")
        mask = None if entry.mask is None else read_mask(manifest, entry.mask, f"{place}.mask")
        references.append(ReferencePicture(image, entry.grid, mask))
    return SamplePictures(read_picture(manifest, row.target, f"{row.place}.target"), row.target_grid, references)


def read_picture(manifest: Manifest, relative: str, place: str) -> Image.Image:
    """Read a picture of the data set as RGB.

    Raises:
        FileNotFoundError, ValueError: As `load_image`, with the place before the message.
    """
    path = manifest.file(relative, place)
    try:
        return to_rgb(load_image(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{place}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def read_mask(manifest: Manifest, relative: str, place: str) -> np.ndarray:
    """Read a mask as bool [height, width]: values above the middle (data fact A6). Raises as `read_picture`."""
    return np.asarray(read_picture(manifest, relative, place).convert("L")) > 127
