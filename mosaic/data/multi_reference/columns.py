"""The manifest by columns: what the format asks of them, and one pass over all rows that finds the bad ones and keeps a few numbers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mosaic.data.multi_reference.rows import MAX_GRID_SIDE, MAX_JSON, MAX_REFERENCES, MAX_SIDE, MAX_TEXT, parse_row
from mosaic.data.schemas import require_distinct

TEXT_COLUMNS = ("id", "split", "prompt", "target", "points")
REQUIRED = (*TEXT_COLUMNS, "references", "reference_grid", "target_grid")
OPTIONAL = ("target_size", "scores", "metadata")
BATCH_ROWS = 8192  # rows held at a time during the pass
UNSAFE_PATH = r"^$|^/|(^|/)\.\.(/|$)|[\\:\x00]"  # a coarse net; `relative_path` decides
UNSAFE_ID = r"^$|[^A-Za-z0-9_-]"


class Table(Protocol):
    """The rows of a data set with the columns of a manifest, however they are stored.

    Attributes:
        path: Its address, for messages.
    """

    path: str

    @property
    def schema(self) -> pa.Schema:
        """Its columns."""

    def place(self, number: int) -> str:
        """Return where a row stands, for messages."""

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield all rows in order, some thousand at a time; ValueError where they are damaged."""

    def values(self, number: int) -> dict[str, Any]:
        """Return a row as value by column; ValueError where it is damaged."""


class Geometry(NamedTuple):
    """What many rows have in common: the sizes that decide about buckets and grids.

    Attributes:
        target_rows: Rows of `target_grid`.
        target_columns: Columns of it.
        target_height: Height of the target picture in pixels; 0 where the manifest does not say.
        target_width: Width of the target picture in pixels; 0 where the manifest does not say.
        reference_side: Longer side of the coarsest of the row's reference grids, in cells.
    """

    target_rows: int
    target_columns: int
    target_height: int
    target_width: int
    reference_side: int


class Summary(NamedTuple):
    """What stays in memory of a split: 10 bytes a row.

    Attributes:
        numbers: int32 [N], number of each row in the file.
        num_references: int16 [N], K of each row.
        geometry: int32 [N], number of each row's geometry in `geometries`.
        geometries: The different geometries.
        splits: All splits of the file.
    """

    numbers: np.ndarray
    num_references: np.ndarray
    geometry: np.ndarray
    geometries: list[Geometry]
    splits: set[str]


def check_columns(schema: pa.Schema, path: str) -> list[str]:
    """Return the columns to read.

    Raises:
        ValueError: A column is missing, is there twice, or has another type than the format says.
    """
    missing = [name for name in REQUIRED if name not in schema.names]
    if missing:
        raise ValueError(f"{path}: the column {missing[0]} is missing. Found: {', '.join(schema.names)}.")
    require_distinct(schema, (*REQUIRED, *OPTIONAL), path)
    present = [name for name in (*REQUIRED, *OPTIONAL) if name in schema.names]
    for name in present:
        if not _has_type(name, schema.field(name).type):
            raise ValueError(f"{path}: the column {name} must be {_type_in_words(name)}, got {schema.field(name).type}.")
    return present


def summarise(table: Table, split: str | None) -> Summary:
    """Go once through all rows, a few thousand at a time.

    Args:
        table: The rows.
        split: The split to keep; None: every row.

    Raises:
        ValueError: A cell of a required column is null, an id stands twice, `parse_row` refuses a row of the split, or a file is damaged.
    """
    columns = check_columns(table.schema, table.path)
    numbers, counts, geometry, hashes = ([np.zeros(0, kind)] for kind in (np.int32, np.int16, np.int32, np.int64))
    known: dict[Geometry, int] = {}
    splits: set[str] = set()
    start = 0
    for batch in table.batches(columns):
        for name in REQUIRED:
            if batch[name].null_count:
                row = start + pc.index(batch[name].is_null(), True).as_py()
                raise ValueError(f"{table.place(row)}.{name}: must not be null.")
        hashes.append(np.fromiter(map(hash, batch["id"].to_pylist()), np.int64, len(batch)))
        splits.update(pc.unique(batch["split"]).to_pylist())
        chosen = np.arange(len(batch)) if split is None else np.flatnonzero(pc.equal(batch["split"], split).to_numpy(zero_copy_only=False))
        rows = batch.take(pa.array(chosen))
        sizes = _check_rows(rows, start + chosen, table)
        numbers.append((start + chosen).astype(np.int32))
        counts.append(pc.list_value_length(rows["references"]).to_numpy().astype(np.int16))
        unique, inverse = np.unique(sizes, axis=0, return_inverse=True)
        index = [known.setdefault(Geometry(*map(int, values)), len(known)) for values in unique]
        geometry.append(np.array(index, np.int32)[inverse.reshape(-1)])
        start += len(batch)
    _refuse_equal_ids(table, np.concatenate(hashes))
    return Summary(np.concatenate(numbers), np.concatenate(counts), np.concatenate(geometry), list(known), splits)


def _refuse_equal_ids(table: Table, hashes: np.ndarray) -> None:
    """Raise ValueError for an id that stands twice. Equal hashes are suspects only: a second pass looks at their ids."""
    values, counts = np.unique(hashes, return_counts=True)
    suspects = set(values[counts > 1].tolist())
    found: dict[str, int] = {}
    for batch in table.batches(["id"]) if suspects else ():
        for name in batch["id"].to_pylist():
            if hash(name) in suspects:
                found[name] = found.get(name, 0) + 1
    for name, count in found.items():
        if count > 1:
            raise ValueError(f'{table.path}: ids must be unique, but "{name}" is the id of {count} rows.')


def _check_rows(rows: pa.RecordBatch, numbers: np.ndarray, table: Table) -> np.ndarray:
    """Return int64 [N, 5], the geometry of each row; raise ValueError for the first bad row.

    Columns are searched for suspects, which is fast; `parse_row` then decides.
    """
    references = rows["references"]
    suspects = pc.match_substring_regex(rows["prompt"], r"^\s*$").to_numpy(zero_copy_only=False)
    lengths = pc.list_value_length(references).to_numpy()
    suspects = suspects | (lengths < 1) | (lengths > MAX_REFERENCES)
    for name in (*TEXT_COLUMNS, "scores", "metadata"):
        if name in rows.schema.names:
            suspects |= _too_long(rows[name], name)
    for name, pattern in (("id", UNSAFE_ID), ("target", UNSAFE_PATH), ("points", UNSAFE_PATH)):
        suspects |= pc.match_substring_regex(rows[name], pattern).to_numpy(zero_copy_only=False)
    items, parents = pc.list_flatten(references), pc.list_parent_indices(references).to_numpy()
    fields = items.type.names
    for name in {"image", "phrase", "mask", "scores", "kind"} & set(fields):
        suspects[parents[_too_long(pc.struct_field(items, name), name)]] = True
    image = pc.struct_field(items, "image")
    suspects[parents[_flagged(image, lambda column: pc.match_substring_regex(column, UNSAFE_PATH), if_null=True)]] = True
    if "mask" in fields:
        mask = pc.struct_field(items, "mask")
        suspects[parents[_flagged(mask, lambda column: pc.match_substring_regex(column, UNSAFE_PATH), if_null=False)]] = True
    pairs = {}
    for name in ("reference_grid", "target_grid", "target_size"):
        column = rows[name] if name in rows.schema.names else pa.nulls(len(rows), pa.list_(pa.int32()))
        pairs[name], bad = _pairs(column, MAX_SIDE if name == "target_size" else MAX_GRID_SIDE)
        suspects |= bad
    sides = pairs["reference_grid"].max(axis=1, initial=0)[parents]
    if "grid" in fields:
        own, bad = _pairs(pc.struct_field(items, "grid"), MAX_GRID_SIDE)
        suspects[parents[bad]] = True
        sides = np.where(own.any(axis=1), own.max(axis=1, initial=0), sides)
    for index in np.flatnonzero(suspects):
        values = rows.slice(index, 1).to_pylist()[0]
        parse_row(values, f'{table.place(numbers[index])} (id "{values["id"]}")')
    coarsest = np.full(len(rows), MAX_GRID_SIDE)
    np.minimum.at(coarsest, parents, sides)
    return np.column_stack([pairs["target_grid"], pairs["target_size"], coarsest])


def _flagged(column: pa.Array, test: Callable[[pa.Array], pa.Array], if_null: bool) -> np.ndarray:
    """Return a bool array: where the test holds, and `if_null` where the cell is null."""
    return pc.fill_null(test(column), if_null).to_numpy(zero_copy_only=False)


def _too_long(column: pa.Array, name: str) -> np.ndarray:
    """Return a bool array: which texts have more bytes than characters are allowed, so that `parse_row` must count these."""
    most = MAX_JSON if name in ("scores", "metadata") else MAX_TEXT
    return _flagged(column, lambda texts: pc.greater(pc.binary_length(texts), most), if_null=False)


def _pairs(column: pa.Array, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 [N, 2], zeros where the cell is null, and bool [N]: which cells are not two numbers within [1, most]."""
    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
    bad = (lengths != 2) & (lengths != -1)
    pairs = np.zeros((len(column), 2), np.int64)
    if not bad.any() and (lengths == 2).any():
        numbers = pc.fill_null(pc.list_flatten(column), 0).to_numpy(zero_copy_only=False)
        pairs[lengths == 2] = numbers.astype(np.int64).reshape(-1, 2)
        bad = (lengths == 2) & ((pairs < 1) | (pairs > most)).any(axis=1)
    return pairs, bad


def _has_type(name: str, found: pa.DataType) -> bool:
    """Return whether a column has the type that the format asks for."""
    if name in (*TEXT_COLUMNS, "scores", "metadata"):
        return _is_text(found)
    if name != "references":
        return _is_integer_list(found)
    if not _is_list(found) or not pa.types.is_struct(found.value_type):
        return False
    fields = {field.name: field.type for field in found.value_type}
    texts = all(_is_text(fields[key]) for key in ("image", "phrase", "mask", "scores", "kind") if key in fields)
    return "image" in fields and texts and ("grid" not in fields or _is_integer_list(fields["grid"]))


def _is_text(found: Any) -> bool:
    return pa.types.is_string(found) or pa.types.is_large_string(found)


def _is_list(found: Any) -> bool:
    return pa.types.is_list(found) or pa.types.is_large_list(found)


def _is_integer_list(found: Any) -> bool:
    return _is_list(found) and pa.types.is_integer(found.value_type)


def _type_in_words(name: str) -> str:
    """Return the type of a column, for messages."""
    if name == "references":
        return (
            "a list of structs with a field image and, if at all, phrase, mask, scores and kind as strings and grid as a list of integers"
        )
    return "a list of integers" if name in ("reference_grid", "target_grid", "target_size") else "a string"
