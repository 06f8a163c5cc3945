"""One row of a manifest: what it holds, and whether that is sound. preprocess/manifest.schema.json says the same as JSON Schema.

Everything read here is untrusted: paths may not leave the data set's folder, and nothing may be so many or so long as to fill
the memory.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mosaic.config.sections import MAX_REFERENCES
from mosaic.files import relative_path, shown
from mosaic.method.grids import Grid

MAX_SIDE = 65_535
"""Longest side of a picture in pixels that a manifest may state."""
MAX_GRID_SIDE = 4096
"""Longest side of a grid in cells: one cell per pixel of a picture of that side."""
MAX_TEXT = 2**16
"""Most characters of a prompt, a phrase, a path, an id, a split or a kind."""
MAX_JSON = 2**20
"""Most characters of the JSON texts `metadata` and `scores`, which readers need not look at."""
_ID = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class ReferenceEntry:
    """One reference of a row.

    Attributes:
        image: Path of the picture, relative to the root.
        phrase: The words of the prompt that mean it; "" where the manifest has none.
        mask: Path of the picture that shows where it is seen in the target; None: not known.
        grid: Grid of u over this picture's own frame: its own, or else the row's `reference_grid`.
    """

    image: str
    phrase: str
    mask: str | None
    grid: Grid


@dataclass(frozen=True)
class Row:
    """One sample as the manifest lists it.

    Attributes:
        place: File, row and id, for messages.
        id: Name of the sample, unique in the data set.
        split: Split the sample belongs to.
        prompt: Caption of the target.
        target: Path of the target picture, relative to the root.
        references: The K references in order.
        points: Path of the points' safetensors file, relative to the root; the file is absent until the sample has been matched.
        reference_grid: Grid of u for references without a grid of their own.
        target_grid: Grid of v.
        target_size: Height and width of the target picture in pixels; None where the manifest does not say.
        metadata: JSON text: where the sample comes from.
    """

    place: str
    id: str
    split: str
    prompt: str
    target: str
    references: tuple[ReferenceEntry, ...]
    points: str
    reference_grid: Grid
    target_grid: Grid
    target_size: tuple[int, int] | None
    metadata: str


def parse_row(values: Mapping[str, Any], place: str) -> Row:
    """Make a row of the values of its columns.

    Args:
        values: Value by column; optional columns may be missing or None.
        place: File and row, for messages.

    Raises:
        ValueError: A value is missing, empty, of the wrong type or beyond one of the bounds above; a path leaves the root; a grid or size
            is not two positive integers.
    """
    for name in ("id", "split", "prompt"):
        _text(values.get(name), f"{place}.{name}")
    if not _ID.fullmatch(values["id"]):
        raise ValueError(
            f'{place}.id: must be of letters a to z, digits, "-" and "_", for files are named by it, got {shown(values["id"])}.'
        )
    if not values["prompt"].strip():
        raise ValueError(f"{place}.prompt: must not be empty, got {shown(values['prompt'])}.")
    references = values.get("references")
    if not isinstance(references, list) or not references:
        empty = "an empty list" if references == [] else shown(references)
        raise ValueError(f"{place}.references: must hold at least one reference, got {empty}.")
    if len(references) > MAX_REFERENCES:
        raise ValueError(f"{place}.references: must be at most {MAX_REFERENCES}, got {len(references)}.")
    for name in ("scores", "metadata"):
        _optional_text(values.get(name), f"{place}.{name}", MAX_JSON)
    reference_grid = _grid(values.get("reference_grid"), f"{place}.reference_grid")
    size = values.get("target_size")
    return Row(
        place=place,
        id=values["id"],
        split=values["split"],
        prompt=values["prompt"],
        target=_path(values.get("target"), f"{place}.target"),
        references=tuple(_entry(entry, reference_grid, f"{place}.references[{k}]") for k, entry in enumerate(references)),
        points=_path(values.get("points"), f"{place}.points"),
        reference_grid=reference_grid,
        target_grid=_grid(values.get("target_grid"), f"{place}.target_grid"),
        target_size=None if size is None else _sides(size, f"{place}.target_size", "height and width", MAX_SIDE),
        metadata=values.get("metadata") or "{}",
    )


def _entry(entry: Any, reference_grid: Grid, place: str) -> ReferenceEntry:
    """Return one element of the column `references`."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{place}: must be a reference with an image, got {shown(entry)}.")
    image = _path(entry.get("image"), f"{place}.image")
    for name, most in (("phrase", MAX_TEXT), ("scores", MAX_JSON), ("kind", MAX_TEXT)):
        _optional_text(entry.get(name), f"{place}.{name}", most)
    mask, grid = entry.get("mask"), entry.get("grid")
    return ReferenceEntry(
        image=image,
        phrase=entry.get("phrase") or "",
        mask=None if mask is None else _path(mask, f"{place}.mask"),
        grid=reference_grid if grid is None else _grid(grid, f"{place}.grid"),
    )


def _text(value: Any, place: str, most: int = MAX_TEXT) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{place}: must be a string, got {shown(value)}.")
    if len(value) > most:
        raise ValueError(f"{place}: must have at most {most} characters, got {len(value)}.")


def _optional_text(value: Any, place: str, most: int) -> None:
    if value is not None:
        _text(value, place, most)


def _path(value: Any, place: str) -> str:
    """Return a path below the root, or raise ValueError."""
    path = relative_path(value, place)
    _text(path, place)
    return path


def _grid(value: Any, place: str) -> Grid:
    """Return a grid, or raise ValueError."""
    return Grid(*_sides(value, place, "rows and columns", MAX_GRID_SIDE))


def _sides(value: Any, place: str, names: str, most: int) -> tuple[int, int]:
    """Return two sides within [1, most], or raise ValueError."""
    if not isinstance(value, list) or len(value) != 2 or any(type(side) is not int or side < 1 for side in value):
        raise ValueError(f"{place}: must be two positive integers, {names}, got {shown(value)}.")
    if max(value) > most:
        raise ValueError(f"{place}: must be at most {most} in both sides, got {shown(value)}.")
    return value[0], value[1]
