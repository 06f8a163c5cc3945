"""One row of a manifest: what it holds, and whether that is sound. preprocess/manifest.schema.json says the same as JSON Schema.

Everything read here is untrusted: paths may not leave the data set's folder.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mosaic.files import relative_path, shown
from mosaic.method.grids import Grid

MAX_SIDE = 65_535
"""Longest side of a grid in cells, or of a picture in pixels, that a manifest may state."""
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
        ValueError: A value is missing, empty or of the wrong type; a path leaves the root; a grid or size is not two positive integers.
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
    for name in ("scores", "metadata"):
        _optional_text(values.get(name), f"{place}.{name}")
    reference_grid = _sides(values.get("reference_grid"), f"{place}.reference_grid", "rows and columns")
    size = values.get("target_size")
    return Row(
        place=place,
        id=values["id"],
        split=values["split"],
        prompt=values["prompt"],
        target=relative_path(values.get("target"), f"{place}.target"),
        references=tuple(_entry(entry, Grid(*reference_grid), f"{place}.references[{k}]") for k, entry in enumerate(references)),
        points=relative_path(values.get("points"), f"{place}.points"),
        reference_grid=Grid(*reference_grid),
        target_grid=Grid(*_sides(values.get("target_grid"), f"{place}.target_grid", "rows and columns")),
        target_size=None if size is None else _sides(size, f"{place}.target_size", "height and width"),
        metadata=values.get("metadata") or "{}",
    )


def _entry(entry: Any, reference_grid: Grid, place: str) -> ReferenceEntry:
    """Return one element of the column `references`."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{place}: must be a reference with an image, got {shown(entry)}.")
    image = relative_path(entry.get("image"), f"{place}.image")
    for name in ("phrase", "scores", "kind"):
        _optional_text(entry.get(name), f"{place}.{name}")
    mask, grid = entry.get("mask"), entry.get("grid")
    return ReferenceEntry(
        image=image,
        phrase=entry.get("phrase") or "",
        mask=None if mask is None else relative_path(mask, f"{place}.mask"),
        grid=reference_grid if grid is None else Grid(*_sides(grid, f"{place}.grid", "rows and columns")),
    )


def _text(value: Any, place: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{place}: must be a string, got {shown(value)}.")


def _optional_text(value: Any, place: str) -> None:
    if value is not None:
        _text(value, place)


def _sides(value: Any, place: str, names: str) -> tuple[int, int]:
    """Return two sides within [1, MAX_SIDE], or raise ValueError."""
    if not isinstance(value, list) or len(value) != 2 or any(type(side) is not int or side < 1 for side in value):
        raise ValueError(f"{place}: must be two positive integers, {names}, got {shown(value)}.")
    if max(value) > MAX_SIDE:
        raise ValueError(f"{place}: must be at most {MAX_SIDE} in both sides, got {shown(value)}.")
    return value[0], value[1]
