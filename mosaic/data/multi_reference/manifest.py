"""The manifest of a data set in the multi-reference format, version 1 (preprocess/FORMAT.md), in either of its forms.

Rows are read at random; memory is nearly flat in their number.
"""

import hashlib
import json
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from torch import Tensor

from mosaic.data.masks import decode_mask
from mosaic.data.multi_reference.columns import Geometry, Table, summarise
from mosaic.data.multi_reference.parquet_table import ParquetTable
from mosaic.data.multi_reference.points_file import most_bytes, pictures_of, read_match_scores, read_stored_points
from mosaic.data.multi_reference.repository import Repository, absent, find_repository
from mosaic.data.multi_reference.rows import Row, parse_row
from mosaic.data.multi_reference.storage import DESCRIPTION, Folder
from mosaic.files import parse_json, shown
from mosaic.images import decode_image, to_rgb

FORMAT = "mosaic-multi-reference"
VERSION = 1


class Manifest:
    """The rows of one split. Only row numbers, K and sizes stay in memory; a row is decoded with its row group when it is asked for.

    Attributes:
        root: Folder of the data set: a path, or the URL or the id on the hub as given.
        folder: Access to its files.
        path: Address of the manifest, or the repository, for messages.
        num_references: int16 [N], K of each row.
        geometry: int32 [N], index of each row's sizes in `geometries`.
        geometries: The different sizes.
    """

    def __init__(self, root: str | Path, split: str | None) -> None:
        """Open the folder or the repository, and check all rows of the split in one pass.

        Args:
            root: Folder of the data set, local or a URL of fsspec; or a repository (`find_repository`).
            split: Split whose rows are kept; None: all rows.

        Raises:
            FileNotFoundError: The folder, one of the two files of the folder form, or the data set on the hub is missing.
            ValueError: A repository cannot be read (`Repository`), another format or version, missing columns, wrong column types, empty
                cells, ids given twice, no row of the split, or a row of it that `parse_row` refuses.
        """
        self.folder, self._table = _opened(root)
        self.root = self.folder.root
        self.path = self._table.path
        self._choose(split)

    def of_split(self, split: str | None) -> "Manifest":
        """The rows of another split of the same data set, which is not opened again; checked in one pass.

        Raises:
            ValueError: There is no row of the split, or `parse_row` refuses one.
        """
        other = copy(self)
        other._choose(split)
        return other

    def _choose(self, split: str | None) -> None:
        summary = summarise(self._table, split)
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
        return self._place(index, self.values(index))

    def row(self, index: int) -> Row:
        """Return one row, its values checked.

        Args:
            index: Number of the row within the split.

        Raises:
            ValueError: The file cannot be read any more, or a column of the row has a value that it must not have (`parse_row`).
        """
        values = self.values(index)
        return parse_row(values, self._place(index, values))

    def values(self, index: int) -> dict[str, Any]:
        """Return one row as it is stored: value by column, those that `Row` leaves out, too. ValueError where it is damaged."""
        return self._table.values(int(self._numbers[index]))

    def column(self, name: str) -> Iterator[Any]:
        """Yield the values of one column of the split's rows, in order; some thousand rows are held at a time."""
        start = 0
        for batch in self._table.batches([name]):
            first, end = np.searchsorted(self._numbers, [start, start + len(batch)])
            yield from batch[name].take(pa.array(self._numbers[first:end] - start)).to_pylist()
            start += len(batch)

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

    def read_target(self, row: Row) -> Image.Image:
        """Read the target picture of a row as RGB, upright.

        Raises:
            FileNotFoundError: It is missing.
            ValueError: As `read_picture`; or it has another size than the manifest says.
        """
        place = f"{row.place}.target"
        picture = self.read_picture(row.target, place)
        found, stated = (picture.height, picture.width), row.target_size
        if stated is not None and found != stated:
            cause = " Height and width are exchanged, as where a picture was measured before it was turned upright." * (
                found[::-1] == stated
            )
            raise ValueError(
                f"{place}: target_size says {stated[0]} x {stated[1]} px (height x width), but {row.target} has {found[0]} x {found[1]}."
                f"{cause} Put the right size into the manifest, or the right picture into its place."
            )
        return picture

    def read_mask(self, row: Row, k: int, target: Image.Image) -> np.ndarray | None:
        """Read the mask of reference k of a row: bool [height, width], True where it is seen; None if there is none.

        Args:
            row: The row.
            k: Number of the reference.
            target: The row's target, over whose frame the mask lies.

        Raises:
            FileNotFoundError: It is missing.
            ValueError: As `read_picture`; or its meaning is not known (`mosaic.data.masks`), or it has another size than the target.
        """
        name, place = row.references[k].mask, f"{row.place}.references[{k}].mask"
        if name is None:
            return None
        data = self.folder.read(name, place)
        try:
            mask = decode_mask(data, name)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if mask.shape != (target.height, target.width):
            raise ValueError(
                f"{place}: a mask must have its target's size, {target.height} x {target.width} px (height x width), but {name} has "
                f"{mask.shape[0]} x {mask.shape[1]}. Make it anew from {row.target}, upright."
            )
        return mask

    def digest(self, row: Row) -> str:
        """SHA-256, in hex, of everything of a row that decides its points: the files of its pictures and masks, and its grids.

        Raises:
            FileNotFoundError, ValueError: A file is missing, cannot be read or is too large.
        """
        files = [(row.target, "target")]
        for k, entry in enumerate(row.references):
            files += [(entry.image, f"references[{k}].image"), (entry.mask or "", f"references[{k}].mask")]
        digest = hashlib.sha256(json.dumps([row.target_grid, *(entry.grid for entry in row.references)]).encode())
        for path, name in files:
            content = self.folder.read(path, f"{row.place}.{name}") if path else b""
            digest.update(len(content).to_bytes(8, "big") + content)
        return digest.hexdigest()

    def check_digest(self, row: Row) -> None:
        """Check that the points of a row were found in the pictures that are there now, as far as its points file says.

        Raises:
            FileNotFoundError: A picture is missing.
            ValueError: They were found in others.
        """
        try:
            found = pictures_of(self.folder.read(row.points, f"{row.place}.points", most_bytes(row.target_grid)))
        except FileNotFoundError:
            return
        if found is not None and found != self.digest(row):
            raise ValueError(
                f"{row.place}.points: {row.points} was found in other pictures, or on other grids, than those that are there now. "
                "preprocess/match.py, started again, matches such samples anew."
            )

    def read_points(self, row: Row) -> list[Tensor] | None:
        """Read the points of a row on the grids they were found on, per reference [P_k, 2] of (u, v); None: it has no points file.

        Raises:
            ValueError: The file is damaged, or a point is out of range or in two references.
        """
        place = f"{row.place}.points"
        try:
            data = self.folder.read(row.points, place, most_bytes(row.target_grid))
        except FileNotFoundError:
            return None
        return read_stored_points(data, [entry.grid for entry in row.references], row.target_grid, f"{place}: {row.points}")

    def read_match_scores(self, row: Row) -> tuple[dict[str, float], ...]:
        """Read what matching recorded beside the points of a row, per reference; () where it has no points file. Its points are sound."""
        try:
            data = self.folder.read(row.points, f"{row.place}.points", most_bytes(row.target_grid))
        except FileNotFoundError:
            return ()
        return read_match_scores(data, len(row.references))

    def _place(self, index: int, values: dict[str, Any]) -> str:
        return f'{self._table.place(int(self._numbers[index]))} (id "{values["id"]}")'


def _opened(root: str | Path) -> tuple[Folder | Repository, Table]:
    """Return the files of a data set, and its rows. Raises as `Manifest`."""
    repository = find_repository(root)
    if repository is not None:
        return repository, repository
    folder = Folder(root)
    if not folder.exists():
        raise FileNotFoundError(absent(folder.root))
    place = folder.path(DESCRIPTION)
    try:
        text = folder.read(DESCRIPTION).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: must be a UTF-8 text file, but byte {error.start} is not UTF-8.") from error
    description = parse_json(text, place)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f'{place}: must hold {{"format": "{FORMAT}", ...}}, got {shown(description)}.')
    version = description.get("version")
    if version != VERSION or isinstance(version, bool):
        raise ValueError(f"{place}: version must be {VERSION}, got {shown(version)}.")
    return folder, ParquetTable(folder)
