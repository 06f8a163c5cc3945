"""The pictures and captions of the Parquet files as `datasets` keeps them: a copy in its cache, read by memory maps.

Within a Parquet file a row is reached by decoding its row group up to it, half of one on average; in the copy it is reached at once, with
the same bytes. Measured on 2,000 rows in the released layout (pictures of 250 KiB, row groups of 100 and of 1,000 rows), CPU seconds on
one core:

| | reading Parquet | the copy |
|---|---:|---:|
| the filter, over all rows | 0.18 | 0.18 (it stays with Parquet, which reads two columns and needs no copy) |
| making the copy, once: 488 MiB of pictures | - | 1.3 and 1.8, and `import datasets` 0.7 |
| opening the copy that is there | - | 0.02 |
| 1,000 rows at random | 13.4 and 82 | 0.14 and 0.2 |
| MiB of memory after that | 92 and 168 | 3 (while the copy is made: 365 and 884, some row groups) |

So rows are read from the copy; where it cannot be made, since a file is damaged or the disk is full, they are read from Parquet, as before,
and a row that is whole is still found. Opening, the filter and the captions of all rows stay with Parquet. Ids hash bytes and captions,
which both ways give alike.
"""

import logging
import shutil
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
COLUMNS = ("image", "description")
_SPARE = 1.2  # of the files' size that must be free for the copy


class MappedRows:
    """The copy. Picklable, and safe to use after a fork."""

    def __init__(self, rows: "Dataset") -> None:
        self._rows = rows

    def values(self, row: int) -> dict[str, Any]:
        """Return the two columns of a row, counted over all files."""
        table = self._rows[row]
        return {name: table[name][0].as_py() for name in COLUMNS}


def open_mapped(files: Sequence[Path], num_rows: int) -> MappedRows | None:
    """Open the copy of some Parquet files; it is made where there is none, or a file has changed since. Of several processes one makes it.

    Args:
        files: In the order of their rows.
        num_rows: Rows of all of them.

    Returns:
        The rows; None where no copy can be made, after a warning that says why.
    """
    import datasets

    paths = [escape(str(path.absolute())) for path in files]
    try:
        builder = datasets.load_dataset_builder("parquet", data_files={"rows": paths}, columns=list(COLUMNS))
        if not Path(builder.cache_dir).is_dir():
            _require_space(Path(datasets.config.HF_DATASETS_CACHE), sum(path.stat().st_size for path in files))
            logger.info("%s: pictures and captions are copied to %s, once, to be read at random.", files[0].parent, builder.cache_dir)
        builder.download_and_prepare()
        rows = builder.as_dataset("rows")
        if len(rows) != num_rows:
            raise ValueError(f"the copy has {len(rows)} rows, the files have {num_rows}")
    except Exception as error:  # of a damaged file all kinds of errors come; the row that is damaged will be named when it is read
        logger.warning(
            "%s: no copy can be made (%s: %s), so rows are read from the Parquet files, each through half of a row group. `python "
            "preprocess/convert.py semalign` stores each picture by itself.",
            files[0].parent,
            type(error).__name__,
            " ".join(str(error).split()),
        )
        return None
    return MappedRows(rows.with_format("arrow"))


def _require_space(cache: Path, size: int) -> None:
    """Raise OSError unless the disk has room for the copy."""
    place = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(place).free, int(size * _SPARE)
    if free < needed:
        raise OSError(f"{place} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are needed; HF_DATASETS_CACHE names another place")
