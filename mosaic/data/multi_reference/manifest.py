"""The manifest of a data set in the multi-reference format, version 1 (preprocess/FORMAT.md).

Rows are read at random; memory is nearly flat in their number.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from mosaic.data.handles import PerProcess
from mosaic.data.multi_reference.columns import Geometry, check_columns, summarise
from mosaic.data.multi_reference.points_file import read_stored_points
from mosaic.data.multi_reference.rows import Row, parse_row
from mosaic.data.multi_reference.storage import Folder
from mosaic.files import parse_json, shown
from mosaic.images import decode_image, to_rgb

logger = logging.getLogger(__name__)
FORMAT = "mosaic-multi-reference"
VERSION = 1
DESCRIPTION, MANIFEST = "dataset.json", "manifest.parquet"
CACHED_GROUPS = 2  # row groups kept decoded; a shuffled order finds none of them again, a sequential one always
LARGE_GROUP = 50_000  # rows of a row group from which on reading single samples is slow
T = TypeVar("T")


class Manifest:
    """The rows of one split. Only row numbers, K and sizes stay in memory; a row is decoded with its row group when it is asked for.

    Attributes:
        root: Folder of the data set: a path, or the URL as given.
        folder: Access to its files.
        path: Address of the manifest, for messages.
        num_references: int16 [N], K of each row.
        geometry: int32 [N], index of each row's sizes in `geometries`.
        geometries: The different sizes.
    """

    def __init__(self, root: str | Path, split: str | None) -> None:
        """Read `dataset.json` and check all rows of the split in one pass over `manifest.parquet`.

        Args:
            root: Folder of the data set, local or a URL of fsspec.
            split: Split whose rows are kept; None: all rows.

        Raises:
            FileNotFoundError: The folder or one of the two files is missing.
            ValueError: Another format or version, missing columns, wrong column types, empty cells, ids given twice, no row of the split,
                or a row of it that `parse_row` refuses.
        """
        self.folder = Folder(root)
        self.root = self.folder.root
        if not self.folder.exists():
            raise FileNotFoundError(f"{self.root}: there is no such folder; data.root must be a data set in the multi-reference format.")
        self._check_description()
        self.path = self.folder.path(MANIFEST)
        self._groups = PerProcess(self._open_groups)
        summary = self._guarded(lambda groups: summarise(groups.file, self.path, split))
        pa.default_memory_pool().release_unused()
        if not len(summary.numbers):
            found = ", ".join(sorted(summary.splits)) or "none, it is empty"
            wanted = "has no sample." if split is None else f'has no sample of the split "{split}".'
            raise ValueError(f"{self.path}: {wanted} Splits found: {found}.")
        self._numbers = summary.numbers
        self.num_references: np.ndarray = summary.num_references
        self.geometry: np.ndarray = summary.geometry
        self.geometries: list[Geometry] = summary.geometries

    def __len__(self) -> int:
        return len(self._numbers)

    def place(self, index: int) -> str:
        """Return file, row and id of a sample, for messages."""
        return self._place(index, self._values(index))

    def row(self, index: int) -> Row:
        """Return one row, its values checked.

        Args:
            index: Number of the row within the split.

        Raises:
            ValueError: The file cannot be read any more, or as for `parse_row`.
        """
        values = self._values(index)
        return parse_row(values, self._place(index, values))

    def column(self, name: str) -> Iterator[Any]:
        """Yield the values of one column of the split's rows, in order, one row group at a time."""
        for group in range(self._guarded(lambda groups: groups.file.metadata.num_row_groups)):
            start, column = self._guarded(partial(RowGroups.column, group=group, name=name))
            first, end = np.searchsorted(self._numbers, [start, start + len(column)])
            yield from column.take(pa.array(self._numbers[first:end] - start)).to_pylist()

    def file(self, relative: str, place: str) -> Path:
        """Return the resolved path of a file of a local data set.

        Raises:
            ValueError: The data set is not local, or a symbolic link leads out of the root.
        """
        return self.folder.local_path(relative, place)

    def read_picture(self, relative: str, place: str) -> Image.Image:
        """Read a picture of the data set as RGB, upright.

        Raises:
            FileNotFoundError: It is missing.
            ValueError: It is damaged, or a symbolic link leads out of the root.
        """
        data = self.folder.read(relative, place)
        try:
            return to_rgb(decode_image(data, relative))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error

    def read_points(self, row: Row) -> list[Tensor] | None:
        """Read the points of a row on the grids they were found on, per reference [P_k, 2] of (u, v); None: it has no points file.

        Raises:
            ValueError: The file is damaged, or a point is out of range or in two references.
        """
        place = f"{row.place}.points"
        try:
            data = self.folder.read(row.points, place)
        except FileNotFoundError:
            return None
        return read_stored_points(data, [entry.grid for entry in row.references], row.target_grid, f"{place}: {row.points}")

    def _place(self, index: int, values: dict[str, Any]) -> str:
        return f'{self.path}[{self._numbers[index]}] (id "{values["id"]}")'

    def _values(self, index: int) -> dict[str, Any]:
        number = int(self._numbers[index])
        return self._guarded(lambda groups: groups.values(number))

    def _guarded(self, action: Callable[["RowGroups"], T]) -> T:
        """Run an action on the file; what pyarrow raises for damage becomes a ValueError."""
        try:
            return action(self._groups.get())
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"{self.path}: cannot be read as Parquet: {error}.") from error

    def _open_groups(self) -> "RowGroups":
        return RowGroups(self.folder, self.path)

    def _check_description(self) -> None:
        """Raise ValueError unless dataset.json names this format and version."""
        place = self.folder.path(DESCRIPTION)
        try:
            text = self.folder.read(DESCRIPTION).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: must be a UTF-8 text file, but byte {error.start} is not UTF-8.") from error
        description = parse_json(text, place)
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            raise ValueError(f'{place}: must hold {{"format": "{FORMAT}", ...}}, got {shown(description)}.')
        version = description.get("version")
        if version != VERSION or isinstance(version, bool):
            raise ValueError(f"{place}: version must be {VERSION}, got {shown(version)}.")


class RowGroups:
    """An open manifest: the row groups used last, decoded."""

    def __init__(self, folder: Folder, path: str) -> None:
        """Open the file; its pages' checksums, where it has them, are verified when they are read."""
        self.file = pq.ParquetFile(folder.open(MANIFEST), pre_buffer=False, page_checksum_verification=True)
        self._columns = check_columns(self.file.schema_arrow, path)
        metadata = self.file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._ends = np.cumsum(np.array(sizes, np.int64))
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        if max(sizes, default=0) > LARGE_GROUP:
            logger.warning(
                "%s: has row groups of up to %d rows. Reading one sample decodes a whole group; write groups of about 1000 rows.",
                path,
                max(sizes),
            )

    def column(self, group: int, name: str) -> tuple[int, pa.ChunkedArray]:
        """Return the number of a row group's first row, and one of its columns."""
        start = int(self._ends[group - 1]) if group else 0
        return start, self.file.read_row_group(group, columns=[name], use_threads=False)[name]

    def values(self, number: int) -> dict[str, Any]:
        """Return a row of the file as value by column."""
        group = int(np.searchsorted(self._ends, number, side="right"))
        if group not in self._tables:
            self._tables[group] = self.file.read_row_group(group, columns=self._columns, use_threads=False)
            while len(self._tables) > CACHED_GROUPS:
                self._tables.popitem(last=False)
        self._tables.move_to_end(group)
        table = self._tables[group]
        start = int(self._ends[group]) - table.num_rows
        return table.slice(number - start, 1).to_pylist()[0]
