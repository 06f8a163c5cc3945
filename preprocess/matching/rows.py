"""The pictures of a sample, as matching needs them."""

from mosaic.data import Manifest, Row
from preprocess.matching.samples import ReferencePicture, SamplePictures
from preprocess.matching.settings import MAX_GRID


def read_pictures(manifest: Manifest, row: Row) -> SamplePictures:
    """Read target, references and masks of a sample.

    Raises:
        FileNotFoundError, ValueError: A picture is missing, damaged or of another size than it should; the message names row and field.
    """
    grids = {"target_grid": row.target_grid} | {f"references[{k}].grid": entry.grid for k, entry in enumerate(row.references)}
    for name, (rows, columns) in grids.items():
        if max(rows, columns) > MAX_GRID:
            raise ValueError(f"{row.place}.{name}: must have at most {MAX_GRID} cells a side to be matched, got {rows} x {columns}.")
    target, references = manifest.read_target(row), []
    for k, entry in enumerate(row.references):
        place = f"{row.place}.references[{k}]"
        image = manifest.read_picture(entry.image, f"{place}.image")
        references.append(ReferencePicture(image, entry.grid, manifest.read_mask(row, k, target)))
    return SamplePictures(target, row.target_grid, references)
