"""The Parquet files of Subjects200K: which rows are kept, and one row at a time (data facts A1-A3).

The pictures stay on the disk: only the two columns of the quality filter are read for all rows, and a row is read from a memory-mapped copy
(`mosaic.data.semalign.mapped`), or where none can be made by streaming its row group up to it. So memory does not grow with the number of
rows, beyond 8 bytes for each kept one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from mosaic.data.handles import PerProcess
from mosaic.data.schemas import require_distinct
from mosaic.data.semalign.mapped import MappedRows, open_mapped
from mosaic.images import decode_image

COLLECTION = "collection_2"
SCORES = ("compositeStructure", "objectConsistency", "imageQuality")
MINIMUM_SCORE = 5
COLUMNS = ("image", "collection", "quality_assessment", "description")
TARGET_BOX = (8, 8, 520, 520)  # px: left, top, right, bottom; two panels of 512 px, 8 px of padding around each
REFERENCE_BOX = (528, 8, 1040, 520)
COMPOSITE_SIZE = (1040, 520)  # px, width and height: the least that holds both panels
BATCH_ROWS = 8  # rows decoded at a time while a row group is streamed
BUFFER_BYTES = 2**20


@dataclass(frozen=True)
class StoredRow:
    """One row as it is stored.

    Attributes:
        place: File and row, for messages.
        image: The encoded composite of both panels.
        item: What the subject is called.
        caption: Caption of the target, the left panel (`description_0`).
        reference_caption: Caption of the reference (`description_1`), which training does not use; "" where there is none.
    """

    place: str
    image: bytes
    item: str
    caption: str
    reference_caption: str

    def panels(self) -> tuple[Image.Image, Image.Image]:
        """Decode the composite and cut out target and reference, each of 512 x 512 px in the mode of the file.

        Raises:
            ValueError: The picture is damaged, too small to hold both, or so large that its panels are of another size.
        """
        try:
            composite = decode_image(self.image, f"its {len(self.image)} bytes")
        except ValueError as error:
            raise ValueError(f"{self.place}.image: {error}") from error
        if composite.width < COMPOSITE_SIZE[0] or composite.height < COMPOSITE_SIZE[1]:
            raise ValueError(
                f"{self.place}.image: must be at least {' x '.join(map(str, COMPOSITE_SIZE))} px (width x height), two panels of 512 px "
                f"with 8 px around them, got {composite.width} x {composite.height}."
            )
        if composite.width >= 2 * COMPOSITE_SIZE[0] and composite.height >= 2 * COMPOSITE_SIZE[1]:
            raise ValueError(
                f"{self.place}.image: must hold two panels of 512 px, got {composite.width} x {composite.height} px (width x height), of "
                "which panels of that size would be a corner only."
            )
        return composite.crop(TARGET_BOX), composite.crop(REFERENCE_BOX)


class SemAlignRows:
    """The rows that pass the quality filter, over all Parquet files of a folder in the order of their names."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Check the files' columns and apply the filter.

        Good are the rows of collection_2 whose quality assessment is there with all three scores at 5 or more (A2).

        Args:
            files: Parquet files, in the order that numbers their rows.

        Raises:
            ValueError: A file cannot be read as Parquet, or lacks a column or has one of another type.
        """
        self.files = list(files)
        self._handles = [PerProcess(partial(_open, path)) for path in self.files]
        good: list[np.ndarray] = []
        groups, total = [], 0
        for number, path in enumerate(self.files):
            file, first = self._handles[number].get(), total
            _check_schema(file.schema_arrow, path)
            good.extend(first + rows for rows in _good_rows(file, path))
            for group in range(file.num_row_groups):
                groups.append((total, number, group, first))
                total += file.metadata.row_group(group).num_rows
        self.num_rows = total
        """Number of all rows, before the filter."""
        self.good = np.concatenate([np.zeros(0, np.int64), *good])
        """int64 [N]: the rows that pass the filter, counted over all files."""
        self._groups = np.array(groups, dtype=np.int64).reshape(-1, 4)
        """int64 [G, 4] per row group: its first row, its file, its number in that file, and the first row of that file."""

    @cached_property
    def mapped(self) -> MappedRows | None:
        """The copy that rows are read from, made on first use; None where none can be made. Workers that are forked later share it."""
        return open_mapped(self.files, self.num_rows)

    def read(self, row: int) -> StoredRow:
        """Read one row.

        Args:
            row: Its number, counted over all files.

        Raises:
            ValueError: The file is damaged, or the picture, the item or the caption is missing.
        """
        group = np.searchsorted(self._groups[:, 0], row, side="right") - 1
        start, number, group_in_file, file_start = self._groups[group].tolist()
        place, offset = f"{self.files[number]}[{row - file_start}]", row - start
        columns = ["image", "description"]
        if self.mapped is not None:
            return _stored_row(place, self.mapped.values(row))
        try:
            for batch in self._handles[number].get().iter_batches(BATCH_ROWS, [group_in_file], columns, use_threads=False):
                if offset < batch.num_rows:
                    return _stored_row(place, {name: batch.column(name)[offset].as_py() for name in columns})
                offset -= batch.num_rows
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{place}: cannot be read: {error}.") from error
        raise ValueError(f"{place}: cannot be read: the row group has fewer rows than the file says.")

    def captions(self, rows: np.ndarray) -> list[str]:
        """Read the captions of many rows, without those that are null; no picture is read.

        Args:
            rows: Their numbers, counted over all files, ascending.

        Raises:
            ValueError: A file is damaged.
        """
        found = []
        for start, number, group, file_start in self._groups.tolist():
            first, end = np.searchsorted(rows, [start, start + self._handles[number].get().metadata.row_group(group).num_rows])
            if first == end:
                continue
            try:
                table = self._handles[number].get().read_row_group(group, columns=["description"], use_threads=False)
                captions = pc.struct_field(table["description"], "description_0").take(pa.array(rows[first:end] - start))
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{self.files[number]}[{start - file_start}]: cannot be read: {error}.") from error
            found.extend(captions.drop_null().to_pylist())
        return found


def find_parquet(root: Path, location: str | Path | None, exclude: Sequence[Path] = ()) -> list[Path]:
    """Return the Parquet files of a data set, sorted by name.

    Args:
        root: Folder of the data set, whose `data/*.parquet` are taken.
        location: A file, or a folder of Parquet files, to take instead.
        exclude: Files to leave out.

    Raises:
        FileNotFoundError: There is no such file or folder, or it holds no Parquet file.
    """
    path = root / "data" if location is None else Path(location)
    cure = "it must hold the Parquet files of Subjects200K; say where they are with parquet (data.parquet in a config)."
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such folder; {cure}")
    left_out = {file.resolve() for file in exclude}
    files = [path] if path.is_file() else sorted(file for file in path.glob("*.parquet") if file.resolve() not in left_out)
    if not files:
        raise FileNotFoundError(f"{path}: has no *.parquet file; {cure}")
    return files


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}.") from error


def _check_schema(schema: pa.Schema, path: Path) -> None:
    for name in COLUMNS:
        if schema.names.count(name) != 1:
            raise ValueError(f"{path}: must have one column {name}. Found: {', '.join(schema.names)}.")
    require_distinct(schema, COLUMNS, str(path))
    image, collection, quality, description = (schema.field(name).type for name in COLUMNS)
    if pa.types.is_struct(image):
        image = image.field("bytes").type if image.get_field_index("bytes") >= 0 else image
    if not (pa.types.is_binary(image) or pa.types.is_large_binary(image)):
        raise ValueError(f"{path}: the column image must hold encoded pictures, as bytes or in a struct with a field bytes, got {image}.")
    if not _is_text(collection):
        raise ValueError(f"{path}: the column collection must be a string, got {collection}.")
    for name in SCORES:
        found = _field_type(quality, name)
        if found is not None and not (pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_null(found)):
            raise ValueError(f"{path}: quality_assessment.{name} must be a number, got {found}.")
    if not (pa.types.is_struct(quality) or pa.types.is_null(quality)):
        raise ValueError(f"{path}: the column quality_assessment must be a struct, got {quality}.")
    for name in ("item", "description_0"):
        found = _field_type(description, name)
        if found is None or not _is_text(found):
            raise ValueError(f"{path}: the column description must be a struct with a string {name}, got {description}.")


def _good_rows(file: pq.ParquetFile, path: Path) -> Iterator[np.ndarray]:
    """Row numbers within a file that pass the filter, batch by batch."""
    start = 0
    try:
        for batch in file.iter_batches(65536, columns=["collection", "quality_assessment"], use_threads=False):
            keep = pc.equal(batch.column("collection"), COLLECTION)
            quality = batch.column("quality_assessment")
            for name in SCORES:
                if _field_type(quality.type, name) is None:  # a missing key counts 0
                    keep = pc.and_(keep, False)
                else:
                    keep = pc.and_(keep, pc.fill_null(pc.greater_equal(pc.struct_field(quality, name), MINIMUM_SCORE), False))
            yield start + np.flatnonzero(pc.fill_null(keep, False).to_numpy(zero_copy_only=False))
            start += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}.") from error


def _stored_row(place: str, values: dict[str, Any]) -> StoredRow:
    image, description = values["image"], values["description"] or {}
    data = image.get("bytes") if isinstance(image, dict) else image
    if not data:
        raise ValueError(f"{place}.image: must hold the encoded picture itself, got none; pictures named by a path are not read.")
    for name in ("item", "description_0"):
        if description.get(name) is None:
            raise ValueError(f"{place}.description.{name}: must not be null.")
    return StoredRow(place, data, description["item"], description["description_0"], description.get("description_1") or "")


def _field_type(struct: pa.DataType, name: str) -> pa.DataType | None:
    """Return the type of a field of a struct, None if there is no such field."""
    if not pa.types.is_struct(struct) or struct.get_field_index(name) < 0:
        return None
    return struct.field(name).type


def _is_text(found: pa.DataType) -> bool:
    return pa.types.is_string(found) or pa.types.is_large_string(found)
