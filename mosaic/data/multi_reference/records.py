"""What a converter hands to the writer: one target with its references, and the id of such a sample."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt
from pathlib import Path

import numpy as np
from PIL import Image

from mosaic.images import to_rgb

Picture = Image.Image | Path | bytes
"""A picture, the path of a picture file, or the content of one. Files are stored as they are unless the writer is told otherwise."""


@dataclass(frozen=True)
class ReferenceRecord:
    """One reference of a sample.

    Attributes:
        image: Picture of any size; a reader fits it onto a white square.
        phrase: What the prompt calls it, e.g. "cat".
        points: int [P, 2] of (u, v), u on `grid`, v on the sample's `target_grid`; None: not matched yet.
        mask: [H, W], non-zero where the reference is seen in the target; None if unknown.
        grid: Rows and columns of u over this picture; None: the sample's `reference_grid`.
        scores: Numbers by name, e.g. of filters.
        kind: What it is, e.g. "human", "animal", "object"; None: unknown.
        similarity: [P], how alike the two ends of each point are; None: unknown.
        match_scores: How far the matches can be trusted, by the names of `points_file.MATCH_SCORES`.
    """

    image: Picture
    phrase: str = ""
    points: np.ndarray | None = None
    mask: np.ndarray | None = None
    grid: tuple[int, int] | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    kind: str | None = None
    similarity: np.ndarray | None = None
    match_scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleRecord:
    """One sample: a target picture, its prompt and its references; grids are (rows, columns).

    The references have points or None of them has: a sample is matched as a whole.
    """

    id: str
    split: str
    prompt: str
    target: Picture
    references: Sequence[ReferenceRecord]
    reference_grid: tuple[int, int]
    target_grid: tuple[int, int]
    metadata: Mapping[str, object] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)


def sample_id(pictures: Sequence[Image.Image], text: str) -> str:
    """Name a sample after its content: the same on every machine, whatever wrote or decodes the files losslessly.

    sha256 over, for every picture, height and width as 4 bytes each (big endian) and the RGB bytes row by row (transparency on white), and
    at the end the text in UTF-8. Never over encoded bytes, which depend on the library that made them.

    Args:
        pictures: Target first, then the references in order.
        text: The prompt.

    Returns:
        The first 32 hex digits.
    """
    digest = hashlib.sha256()
    for picture in pictures:
        rgb = to_rgb(picture)
        digest.update(rgb.height.to_bytes(4, "big") + rgb.width.to_bytes(4, "big") + rgb.tobytes())
    digest.update(text.encode("utf-8"))
    return digest.hexdigest()[:32]


def target_grid_of(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the grid of about `side` x `side` cells, nearly square ones, over a target of height and width `size`."""
    aspect = sqrt(size[0] / size[1])
    return _rounded_up(side * aspect), _rounded_up(side / aspect)


def reference_grid_of(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the grid of `side` nearly square cells along the longer side of a reference of height and width `size`."""
    longest = max(size)
    return _rounded_up(side * size[0] / longest), _rounded_up(side * size[1] / longest)


def _rounded_up(value: float) -> int:
    return ceil(value - 1e-9)
