"""The manifest of a data set in the multi-reference format, version 1: what is on disk, checked row by row.

The format is described in preprocess/FORMAT.md. Everything read here is untrusted: paths may not leave the data set's folder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mosaic.schema import read_json, shown
from mosaic.tokens import Grid

FORMAT = "mosaic-multi-reference"
VERSION = 1
TEXT_COLUMNS = ("id", "split", "prompt", "target", "points")
COLUMNS = (*TEXT_COLUMNS, "references", "reference_grid", "target_grid")


@dataclass(frozen=True)
class Row:
    """One sample as the manifest lists it.

    Attributes:
        place: File, row and id, for messages.
        id: Name of the sample, unique in the data set.
        prompt: Caption of the target.
        target: Path of the target picture, relative to the root.
        references: Paths of the K reference pictures, relative to the root.
        points: Path of the points' safetensors file, relative to the root.
        reference_grid: Grid on which u was found.
        target_grid: Grid on which v was found.
    """

    place: str
    id: str
    prompt: str
    target: str
    references: tuple[str, ...]
    points: str
    reference_grid: Grid
    target_grid: Grid


class Manifest:
    """The rows of one split, kept as Arrow columns: small, and shared by forked loader processes."""

    def __init__(self, root: str | Path, split: str) -> None:
        """Read and check `dataset.json` and `manifest.parquet`.

        Args:
            root: Folder of the data set.
            split: Split whose rows are kept.

        Raises:
            FileNotFoundError: The folder or one of the two files is missing.
            ValueError: Another format or version, missing columns, wrong column types, empty cells, ids given twice, no row of the split,
                or a row of it that `row` refuses.
        """
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: there is no such folder; data.root must be a data set in the multi-reference format.")
        description = read_json(self.root / "dataset.json")
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            raise ValueError(f'{self.root / "dataset.json"}: must hold {{"format": "{FORMAT}", ...}}, got {shown(description)}.')
        version = description.get("version")
        if version != VERSION or isinstance(version, bool):
            raise ValueError(f"{self.root / 'dataset.json'}: version must be {VERSION}, got {shown(version)}.")
        self.path = self.root / "manifest.parquet"
        table = self._read_table()
        chosen = pc.equal(table["split"], split)
        self._numbers = np.flatnonzero(chosen.to_numpy())
        if not len(self._numbers):
            splits = ", ".join(sorted(pc.unique(table["split"]).to_pylist())) or "none, it is empty"
            raise ValueError(f'{self.path}: has no sample of the split "{split}". Splits found: {splits}.')
        self._table = table.filter(chosen).combine_chunks()
        self.num_references: np.ndarray = pc.list_value_length(self._table["references"]).to_numpy()
        """Array [N] of K of each row."""
        self._check_rows()

    def __len__(self) -> int:
        return len(self._numbers)

    def place(self, index: int) -> str:
        """Return file, row and id of a sample, for messages."""
        return f'{self.path}[{self._numbers[index]}] (id "{self._table["id"][index].as_py()}")'

    def row(self, index: int) -> Row:
        """Return one row, its values checked.

        Args:
            index: Number of the row within the split.

        Raises:
            ValueError: An empty cell, a path that leaves the root, no references, or a grid that is not two positive integers.
        """
        place = self.place(index)
        values = {name: self._table[name][index].as_py() for name in COLUMNS}
        references = values["references"]
        if not references:
            raise ValueError(f"{place}.references: must hold at least one reference, got an empty list.")
        images = tuple(
            checked_path((reference or {}).get("image"), f"{place}.references[{k}].image") for k, reference in enumerate(references)
        )
        if not values["prompt"].strip():
            raise ValueError(f"{place}.prompt: must not be empty, got {shown(values['prompt'])}.")
        return Row(
            place=place,
            id=values["id"],
            prompt=values["prompt"],
            target=checked_path(values["target"], f"{place}.target"),
            references=images,
            points=checked_path(values["points"], f"{place}.points"),
            reference_grid=_grid(values["reference_grid"], f"{place}.reference_grid"),
            target_grid=_grid(values["target_grid"], f"{place}.target_grid"),
        )

    def grids(self, name: str) -> np.ndarray:
        """Return the column "reference_grid" or "target_grid" as int array [N, 2] of rows and columns."""
        return pc.list_flatten(self._table[name]).to_numpy().reshape(-1, 2)

    def file(self, relative: str, place: str) -> Path:
        """Return the path of a file of the data set, resolved.

        Raises:
            ValueError: A symbolic link leads out of the root.
        """
        path = (self.root / relative).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise ValueError(f"{place}: must stay in the data set's folder, but {relative} leads to {path}.")
        return path

    def _check_rows(self) -> None:
        """Raise ValueError for the first bad row. Columns are searched for suspects, which is fast; `row` then decides."""
        suspects = pc.match_substring_regex(self._table["prompt"], r"^\s*$").to_numpy() | (self.num_references < 1)
        for name in ("target", "points"):
            suspects |= pc.match_substring_regex(self._table[name], UNSAFE_PATH).to_numpy()
        for name in ("reference_grid", "target_grid"):
            suspects |= pc.list_value_length(self._table[name]).to_numpy() != 2
            _mark(suspects, self._table[name], lambda sides: pc.less(sides, 1))
        _mark(suspects, self._table["references"], lambda items: pc.match_substring_regex(pc.struct_field(items, "image"), UNSAFE_PATH))
        for index in np.flatnonzero(suspects):
            self.row(index)

    def _read_table(self) -> pa.Table:
        """Read the needed columns of all rows and check names, types, empty cells and ids."""
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: file not found.")
        try:
            with pq.ParquetFile(self.path) as file:
                missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
                if missing:
                    raise ValueError(f"{self.path}: the column {missing[0]} is missing. Found: {', '.join(file.schema_arrow.names)}.")
                table = file.read(columns=list(COLUMNS))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.path}: cannot be read as Parquet: {error}.") from error
        for name in COLUMNS:
            column = table[name]
            if not _has_type(name, column.type):
                raise ValueError(f"{self.path}: the column {name} must be {_type_in_words(name)}, got {column.type}.")
            if column.null_count:
                raise ValueError(f"{self.path}[{pc.index(column.is_null(), True).as_py()}].{name}: must not be null.")
        counts = pc.value_counts(table["id"].combine_chunks())
        twice = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(twice):
            raise ValueError(
                f'{self.path}: ids must be unique, but "{twice[0]["values"].as_py()}" is the id of {twice[0]["counts"].as_py()} rows.'
            )
        return table


UNSAFE_PATH = r"^$|^/|(^|/)\.\.(/|$)|[\\:\x00]"  # a coarse net; `checked_path` decides


def checked_path(path: Any, place: str) -> str:
    """Return a relative path that names something below the root, or raise ValueError."""
    if not isinstance(path, str) or not path or "\x00" in path:
        raise ValueError(f"{place}: must be a path, got {shown(path)}.")
    if "\\" in path or ":" in path.split("/", 1)[0] or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f'{place}: must be relative to the data set\'s folder, with "/" and without "..", got {shown(path)}.')
    return path


def _mark(suspects: np.ndarray, column: pa.ChunkedArray, test: Callable[[pa.Array], pa.Array]) -> None:
    """Set those rows of a list column to True in `suspects` that hold an element which is null or for which `test` is true."""
    flagged = pc.fill_null(test(pc.list_flatten(column)), True).to_numpy()
    suspects[pc.list_parent_indices(column).to_numpy()[flagged]] = True


def _has_type(name: str, found: pa.DataType) -> bool:
    """Return whether a column has the type that the format asks for."""
    if name in TEXT_COLUMNS:
        return pa.types.is_string(found) or pa.types.is_large_string(found)
    if not (pa.types.is_list(found) or pa.types.is_large_list(found)):
        return False
    if name != "references":
        return pa.types.is_integer(found.value_type)
    return pa.types.is_struct(found.value_type) and found.value_type.get_field_index("image") >= 0


def _type_in_words(name: str) -> str:
    """Return the type of a column, for messages."""
    words = {
        "references": "a list of structs with a field image",
        "reference_grid": "a list of integers",
        "target_grid": "a list of integers",
    }
    return words.get(name, "a string")


def _grid(value: Any, place: str) -> Grid:
    """Return a stored grid, or raise ValueError."""
    if len(value) != 2 or any(side is None or side < 1 for side in value):
        raise ValueError(f"{place}: must be two positive integers, rows and columns, got {shown(value)}.")
    return Grid(*value)
