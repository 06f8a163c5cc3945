"""Sample ids of SemAlign-MS-Subjects200K, and the index file that keeps them (data facts A4).

An id is a hash over the bytes of a PNG, so it depends on the deflate library that Pillow happens to load: the same pixels give other ids
with zlib-ng, and with other ids no mask and no coordinate file is found. Hence a canary, a fixed picture whose PNG bytes are known; and
hence the index: a Parquet file of (row, pixels, id), made once where the canary agrees, good everywhere.
"""

import hashlib
import io
import logging
import os
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub.utils import WeakFileLock
from PIL import Image, features
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from mosaic.data.semalign.rows import SemAlignRows
from mosaic.data.workers import loaded
from mosaic.files import replacing

logger = logging.getLogger(__name__)
CLASSIC = "classic zlib"
CANARY_DIGESTS = {
    "69e86a5ea0c63d9b12b8c4960da7d1849fdc6950a054639629e09b991ceccf3d": CLASSIC,
    "83278ab13fcf40e837c673013d1f92541e7f586ea333975be74c865d59572ae5": "zlib-ng 2.2.2",
}
SCHEMA = pa.schema([("row", pa.int64()), ("pixels", pa.string()), ("id", pa.string())])
SAVE_EVERY = 2000  # rows between two savings of a growing index: some minutes
ROWS_PER_WORKER = 64  # fewer rows than this are not worth a process


def sample_id(target: Image.Image, item: str, caption: str) -> str:
    """The released id of a sample.

    Args:
        target: The target panel as cut out of the decoded composite, neither converted nor resized.
        item: What the subject is called.
        caption: Caption of the target.

    Returns:
        64 hexadecimal digits; those of the release only where `deflate_library()` is `CLASSIC`.
    """
    picture = hashlib.sha256(_png(target)).hexdigest()[:8]
    return hashlib.sha256(f"{item}_{caption}_{picture}".encode()).hexdigest()


def pixel_digest(target: Image.Image) -> str:
    """sha256 of the raw pixels of a target panel in its mode: what ties a row of the index to the data, whatever the deflate library."""
    return hashlib.sha256(target.tobytes()).hexdigest()


def canary_picture() -> Image.Image:
    """RGB picture of 256 x 256 px with the value (7 x + 13 y + 29 c + (x y) mod 17) mod 256."""
    y, x, c = np.ogrid[:256, :256, :3]
    return Image.fromarray(((7 * x + 13 * y + 29 * c + (x * y) % 17) % 256).astype(np.uint8))


@cache
def deflate_library() -> str:
    """The library that packs PNG files in this process, judged by the canary: `CLASSIC`, another known one, or "unknown"."""
    digest = hashlib.sha256(_png(canary_picture())).hexdigest()
    return CANARY_DIGESTS.get(digest, "unknown")


def open_ids(path: Path, rows: SemAlignRows, num_workers: int | None = None) -> pa.Table:
    """The ids of all kept rows, from the index file; what it lacks is computed and added, where the deflate library allows.

    Computing shows its progress, saves `path` with ".partial" as it goes and continues from there after an interruption. Of several
    processes one computes, the others wait. Rows that cannot be read are entered without an id, and tried again the next time.

    Args:
        path: The index file.
        rows: The data.
        num_workers: Processes that compute; None: one per CPU core of this process, up to 16.

    Returns:
        Table [N] of `pixels` and `id`, in the order of `rows.good`; null where a row cannot be read.

    Raises:
        ValueError: The index file is damaged or lacks rows and this deflate library gives other ids, or it cannot be written.
    """
    table = _aligned(_read_index(path), rows.good)
    if not table["id"].null_count:
        return table
    if deflate_library() != CLASSIC:
        return _refuse_or_keep(path, table, rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path.with_name(path.name + ".lock")):
            return _complete(path, rows, num_workers)
    except OSError as error:
        raise ValueError(
            f"{path}: the index of sample ids cannot be written ({error}). Name a file in a folder that can be, with id_index "
            "(data.id_index in a config)."
        ) from error


def has_all_ids(path: Path, rows: SemAlignRows) -> bool:
    """Whether the index file knows the id of every kept row, so that `open_ids` only reads it.

    Raises:
        ValueError: The index file is damaged.
    """
    return not _aligned(_read_index(path), rows.good)["id"].null_count


def _refuse_or_keep(path: Path, table: pa.Table, rows: SemAlignRows) -> pa.Table:
    """Return what an index made elsewhere says, unless it does not know all rows."""
    unknown = len(rows.good) - int(pc.sum(table["known"]).as_py() or 0)
    if unknown:
        library = f"{deflate_library()}, zlib {features.version_codec('zlib')}"
        raise ValueError(
            f"{path}: the index of sample ids lacks {unknown} of {len(rows.good)} rows, and they cannot be computed here: ids are hashes "
            f"of PNG bytes, and Pillow's deflate library in this process ({library}) packs other bytes than the release's. Open the data "
            "set once on a machine with classic zlib (Pillow's wheels on most Linux systems), and bring the index file here."
        )
    return table


def _complete(path: Path, rows: SemAlignRows, num_workers: int | None) -> pa.Table:
    """Compute the ids that neither the index nor a partial one holds, and write the index."""
    partial = path.with_name(path.name + ".partial")
    index, begun = _read_index(path), _read_index(partial)
    begun = begun.filter(pc.is_valid(begun["id"]))
    index = pa.concat_tables([begun, index.filter(pc.invert(pc.is_in(index["row"], begun["row"])))])
    missing = rows.good[pc.is_null(_aligned(index, rows.good)["id"]).to_numpy()]
    workers = min(_num_cores() if num_workers is None else num_workers, len(missing) // ROWS_PER_WORKER)
    found, failures, first_failure = [], 0, ""
    index = index.filter(pc.invert(pc.is_in(index["row"], pa.array(missing))))
    _ = rows.mapped  # made before the workers start, who share it
    loader = DataLoader(_Ids(rows, missing), batch_size=None, num_workers=workers)
    for row, pixels, identifier, failure in tqdm(loaded(loader), desc="sample ids", unit="row", total=len(missing)):
        found.append({"row": row, "pixels": pixels, "id": identifier})
        failures, first_failure = failures + bool(failure), first_failure or failure
        if len(found) == SAVE_EVERY:
            index, found = pa.concat_tables([index, pa.Table.from_pylist(found, SCHEMA)]), []
            _write_index(partial, index)
    index = pa.concat_tables([index, pa.Table.from_pylist(found, SCHEMA)]).sort_by("row")
    _write_index(path, index)
    partial.unlink(missing_ok=True)
    if failures:
        logger.warning("%s: %d of %d rows cannot be read; the first: %s", path, failures, len(rows.good), first_failure)
    return _aligned(index, rows.good)


class _Ids(Dataset[tuple[int, str | None, str | None, str]]):
    """(row, pixel digest, id, "") of rows, or (row, None, None, the reason) of those that cannot be read."""

    def __init__(self, rows: SemAlignRows, numbers: np.ndarray) -> None:
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, str | None, str | None, str]:
        row = int(self.numbers[index])
        try:
            stored = self.rows.read(row)
            target, _ = stored.panels()
            return row, pixel_digest(target), sample_id(target, stored.item, stored.caption), ""
        except (ValueError, OSError) as error:  # an OSError: PNG files hold no picture of this mode
            return row, None, None, f"row {row}: {error}"


def _num_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)


def _png(image: Image.Image) -> bytes:
    """PNG bytes with Pillow's defaults, which the ids are hashes of."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _read_index(path: Path) -> pa.Table:
    """Read an index file; an empty table if there is none."""
    if not path.exists():
        return SCHEMA.empty_table()
    cure = "Remove it to have it computed anew"
    try:
        with pq.ParquetFile(path) as file:
            table = file.read(SCHEMA.names).select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowException, KeyError, OSError) as error:
        raise ValueError(f"{path}: must be a Parquet file of row, pixels and id, but cannot be read as one: {error}. {cure}.") from error
    if table["row"].null_count or len(pc.unique(table["row"])) != len(table):
        raise ValueError(f"{path}: must name every row once. {cure}.")
    for name in ("pixels", "id"):
        if not pc.all(pc.match_substring_regex(table[name], "^[0-9a-f]{64}$")).as_py() and table[name].null_count != len(table):
            raise ValueError(f"{path}: {name} must be 64 hexadecimal digits. {cure}.")
    return table


def _write_index(path: Path, table: pa.Table) -> None:
    with replacing(path) as aside:
        pq.write_table(table, aside)


def _aligned(index: pa.Table, good: np.ndarray) -> pa.Table:
    """`pixels` and `id` of the kept rows in their order, and `known`: whether the index names the row at all."""
    position = pc.index_in(pa.array(good, pa.int64()), value_set=index["row"].combine_chunks())
    columns = {name: index[name].combine_chunks().take(position) for name in ("pixels", "id")}
    return pa.table({**columns, "known": pc.is_valid(position)})
