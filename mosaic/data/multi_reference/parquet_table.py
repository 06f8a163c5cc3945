"""The rows of `manifest.parquet`, read at random by row groups."""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mosaic.data.handles import PerProcess
from mosaic.data.multi_reference.columns import BATCH_ROWS, check_columns
from mosaic.data.multi_reference.storage import MANIFEST, Folder

logger = logging.getLogger(__name__)
CACHED_GROUPS = 2  # row groups kept decoded; a shuffled order finds none of them again, a sequential one always
LARGE_GROUP = 50_000  # rows of a row group from which on reading single samples is slow
MAX_GROUP_BYTES = 2**32  # of a row group, unpacked; texts of a million samples take a tenth of that


class ParquetTable:
    """A `Table` (`mosaic.data.multi_reference.columns`) over a manifest file. Picklable, and safe to use after a fork."""

    def __init__(self, folder: Folder) -> None:
        """Name the data set's folder; the file is opened on first use."""
        self.path = folder.path(MANIFEST)
        self._folder = folder
        self._groups = PerProcess(self._open)

    @property
    def schema(self) -> pa.Schema:
        """The file's columns."""
        with self._damage_named():
            return self._groups.get().file.schema_arrow

    def place(self, number: int) -> str:
        """Return file and row, for messages."""
        return f"{self.path}[{number}]"

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield all rows in order, a few thousand at a time, checked as far as pyarrow can (offsets, UTF-8).

        Raises:
            ValueError: The file is damaged.
        """
        with self._damage_named():
            for batch in self._groups.get().file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns), use_threads=False):
                batch.validate(full=True)
                yield batch

    def values(self, number: int) -> dict[str, Any]:
        """Return a row as value by column.

        Raises:
            ValueError: The file is damaged.
        """
        with self._damage_named():
            return self._groups.get().values(number)

    def _open(self) -> "_RowGroups":
        return _RowGroups(self._folder, self.path)

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        """What pyarrow raises for damage becomes a ValueError that names the file."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path}: cannot be read as Parquet: {error}.") from error


class _RowGroups:
    """An open manifest: the row groups used last, decoded."""

    def __init__(self, folder: Folder, path: str) -> None:
        """Open the file; its pages' checksums, where it has them, are verified when they are read."""
        self.file = pq.ParquetFile(folder.open(MANIFEST), pre_buffer=False, page_checksum_verification=True)
        self._columns = check_columns(self.file.schema_arrow, path)
        metadata = self.file.metadata
        for group in range(metadata.num_row_groups):
            _check_group(metadata.row_group(group), f"{path}, row group {group}")
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._ends = np.cumsum(np.array(sizes, np.int64))
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        if max(sizes, default=0) > LARGE_GROUP:
            logger.warning(
                "%s: has row groups of up to %d rows. Reading one sample decodes a whole group; write groups of about 1000 rows.",
                path,
                max(sizes),
            )

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


def _check_group(group: pq.RowGroupMetaData, place: str) -> None:
    """Raise ValueError for a row group that would take too much memory, before it is decoded, by what the file says of itself.

    It is not asked of its columns: where their part of a file is damaged, pyarrow ends the process.
    """
    if group.total_byte_size > MAX_GROUP_BYTES:
        raise ValueError(
            f"{place}: must have at most {MAX_GROUP_BYTES >> 20} MiB unpacked, got {group.total_byte_size >> 20}. Write groups of about "
            "1000 rows, with texts and paths alone."
        )
