"""Columns of Parquet files that others have written."""

from collections.abc import Collection

import pyarrow as pa


def require_distinct(schema: pa.Schema, columns: Collection[str], place: str) -> None:
    """Check that no column is there twice, nor a field of one: Parquet allows it, and one of them would be lost.

    Args:
        schema: Of the file.
        columns: Those that are read.
        place: The file, for the message.

    Raises:
        ValueError: A name is there more than once.
    """
    names = [name for name in schema.names if name in columns]
    _require(names, "", place)
    for name in names:
        _require_fields(schema.field(name).type, name, place)


def _require_fields(kind: pa.DataType, path: str, place: str) -> None:
    if pa.types.is_struct(kind):
        _require([field.name for field in kind], f"{path}.", place)
        for field in kind:
            _require_fields(field.type, f"{path}.{field.name}", place)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        _require_fields(kind.value_type, f"{path}[]", place)


def _require(names: list[str], path: str, place: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{place}: the column {path}{name} must be there once, but is there {names.count(name)} times.")
