"""How a stored picture comes into the training frame, and where that puts the cells of its grid. All positions are exact fractions."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mosaic.images import WHITE
from mosaic.method.grids import Grid

COARSEST_CELL = Fraction(5, 4)
"""Largest side of a grid cell, in tokens. A coarser grid leaves tokens without points and says too little about where a point lies."""


class Span(NamedTuple):
    """One axis of a picture in the training frame, in pixels of that frame: where it begins (negative: cut off) and how long it is."""

    start: Fraction
    length: Fraction


@dataclass(frozen=True)
class Frame:
    """A stored picture in its training frame.

    Attributes:
        height: Height of the training frame in pixels.
        width: Width of it.
        rows: Span of the stored picture's height.
        columns: Span of its width.
    """

    height: int
    width: int
    rows: Span
    columns: Span

    def apply(self, picture: Image.Image) -> Image.Image:
        """Return the training picture (Lanczos); what the stored picture does not cover is white. No copy where nothing changes.

        Args:
            picture: RGB, of the size that the frame was made for.
        """
        size = (self.width, self.height)
        spans = (self.columns, self.rows)
        if picture.size == size and all(span.start == 0 for span in spans):
            return picture
        # The frame lies within the picture: one resampling from the exact box, so that no edge is rounded to a pixel first.
        if all(span.start <= 0 for span in spans):
            left, top = (float(-span.start / span.length * side) for span, side in zip(spans, picture.size, strict=True))
            shares = (Fraction(length) / span.length for length, span in zip(size, spans, strict=True))
            wide, high = (float(share * side) for share, side in zip(shares, picture.size, strict=True))
            box = (left, top, min(left + wide, picture.width), min(top + high, picture.height))
            return picture.resize(size, Image.Resampling.LANCZOS, box=box)
        # The picture lies within the frame: `fit` gives whole pixels, and white around it as in prepared references.
        canvas = Image.new("RGB", size, WHITE)
        inner = (int(self.columns.length), int(self.rows.length))
        scaled = picture if picture.size == inner else picture.resize(inner, Image.Resampling.LANCZOS)
        canvas.paste(scaled, (int(self.columns.start), int(self.rows.start)))
        return canvas

    def carry(self, cells: Tensor, grid: Grid, token_grid: Grid) -> Tensor:
        """Return the tokens that hold the centres of some cells.

        A token covers its upper and left border. Where the picture fills the frame and the token grid divides `grid`, this is the token
        that holds the whole cell.

        Args:
            cells: int64 [N], cells of `grid`, which lies over the stored picture.
            grid: Rows and columns of the stored picture's grid.
            token_grid: Rows and columns of the training frame's tokens.

        Returns:
            int64 [N], row * columns + column on `token_grid`; -1 where the centre is outside the frame.
        """
        # Axis by axis: a frame only shifts and scales, so that rows of cells stay rows.
        row = _carry_axis(cells // grid.columns, grid.rows, self.rows, self.height, token_grid.rows)
        column = _carry_axis(cells % grid.columns, grid.columns, self.columns, self.width, token_grid.columns)
        inside = (row >= 0) & (row < token_grid.rows) & (column >= 0) & (column < token_grid.columns)
        return torch.where(inside, row * token_grid.columns + column, -1)

    def check_grid(self, grid: Grid, token_grid: Grid, place: str) -> None:
        """Raise ValueError if the cells of `grid` come out larger than `COARSEST_CELL` tokens in a side."""
        sides = (
            self.rows.length / grid.rows * token_grid.rows / self.height,
            self.columns.length / grid.columns * token_grid.columns / self.width,
        )
        if max(sides) > COARSEST_CELL:
            raise ValueError(
                f"{place}: must be about as fine as the tokens ({token_grid.rows} x {token_grid.columns} over "
                f"{self.height} x {self.width} px) or finer, got {grid.rows} x {grid.columns}, whose cells are "
                f"{float(sides[0]):.2f} x {float(sides[1]):.2f} tokens large. "
                "Match on a finer grid, or train at a smaller size."
            )


def fit(size: tuple[int, int], side: int) -> Frame:
    """Fit a whole picture into the middle of a white square, its aspect kept.

    The longer side becomes `side` pixels, the shorter one is rounded to whole pixels (at least 1); an odd remainder goes to the lower or
    right border.

    Args:
        size: Height and width of the stored picture.
        side: Side of the square.
    """
    longest = max(size)
    spans = []
    for length in size:
        scaled = max(1, (2 * length * side + longest) // (2 * longest))  # rounded, halves up
        spans.append(Span(Fraction((side - scaled) // 2), Fraction(scaled)))
    return Frame(side, side, *spans)


def cover(size: tuple[int, int], frame_size: tuple[int, int]) -> Frame:
    """Cover a frame with the middle of a picture, its aspect kept: nothing is cut off where the aspects agree.

    Args:
        size: Height and width of the stored picture.
        frame_size: Height and width of the frame.
    """
    factor = max(Fraction(wanted, length) for wanted, length in zip(frame_size, size, strict=True))
    lengths = [factor * length for length in size]
    spans = [Span((wanted - length) / 2, length) for wanted, length in zip(frame_size, lengths, strict=True)]
    return Frame(*frame_size, *spans)


def nearest_bucket(heights: np.ndarray, widths: np.ndarray, buckets: list[tuple[int, int]]) -> np.ndarray:
    """Return int16 [N]: the bucket whose aspect (height / width) is nearest on the logarithmic scale, ties to the first.

    Args:
        heights: [N], of the targets, in any unit.
        widths: [N], in the same unit.
        buckets: Height and width of each bucket.
    """
    # By logarithms twice as wide and twice as high are equally far from a square.
    aspects = np.log(np.asarray(heights, np.float64) / widths)
    wanted = np.log([height / width for height, width in buckets])
    distance = np.abs(aspects[:, None] - wanted[None])
    # Rounded, so that equal distances are equal on every machine, whatever the last bit of its logarithm.
    return np.round(distance, 12).argmin(axis=1).astype(np.int16)


def _carry_axis(index: Tensor, cells: int, span: Span, side: int, tokens: int) -> Tensor:
    """floor((start + (index + 1/2) / cells * length) * tokens / side), by a table made of whole numbers of any size."""
    # Cell centres often fall exactly on a border between tokens, where a float would land on either side.
    half_cell = span.length / (2 * cells) * tokens / side
    offset = span.start * tokens / side
    divisor = math.lcm(half_cell.denominator, offset.denominator)
    step, first = int(half_cell * divisor), int(offset * divisor)
    return torch.tensor([((2 * cell + 1) * step + first) // divisor for cell in range(cells)])[index]
