"""Composition: several single-subject samples as panels of one picture, with their points and masks.

The rule that keeps points exact: a canvas is a square grid of cells, a panel is a whole target picture, and every cell of the panel's grid
becomes exactly one cell of the canvas. So v = (row, column) of the panel becomes (top + row, left + column), u stays as it is, and a panel
is resized at most once, as a whole, to a whole number of pixels per cell, never to more than it has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from mosaic.method.grids import Grid

LAYOUTS: dict[int, tuple[tuple[int, int], ...]] = {
    2: ((1, 2), (2, 1), (2, 2)),
    3: ((1, 3), (3, 1), (2, 2)),
    4: ((2, 2),),
    5: ((2, 3), (3, 2)),
    6: ((2, 3), (3, 2)),
}
"""Rows and columns of slots by number of panels; slots that are left over stay empty."""

MARGIN_COLOURS = ((255, 255, 255), (0, 0, 0), (128, 128, 128), (222, 216, 206))
MAX_MARGIN = 8  # the largest margin between panels is a panel's side / this
SQUARE_CELLS = 1.1  # largest ratio of a cell's sides; squarer cells are not visibly stretched


@dataclass(frozen=True)
class Panel:
    """A single-subject sample that becomes a panel.

    Attributes:
        prompt: Its caption.
        picture: Its target, RGB.
        grid: Grid of v over it; the panels of a canvas share one.
        points: int64 [P, 2] of (u, v); None: not matched yet.
        mask: uint8 [H, W] over the target, non-zero where its reference is seen; None: not known.
    """

    prompt: str
    picture: Image.Image
    grid: Grid
    points: np.ndarray | None = field(repr=False)
    mask: np.ndarray | None = field(repr=False)


@dataclass(frozen=True)
class Layout:
    """Where panels lie on a canvas.

    Attributes:
        side: Cells per side of the canvas.
        slots: Rows and columns of slots.
        places: Slot (row, column) of each panel, in reading order.
        corners: Upper left cell (row, column) of each panel.
        colour: RGB of what no panel covers.
    """

    side: int
    slots: tuple[int, int]
    places: tuple[tuple[int, int], ...]
    corners: tuple[tuple[int, int], ...]
    colour: tuple[int, int, int]


def draw_layout(num_panels: int, grid: Grid, rng: np.random.Generator) -> Layout:
    """Draw slots, margin, colour and place of the whole on a square canvas, all in whole cells.

    Args:
        num_panels: 2 to 6.
        grid: Rows and columns of cells of every panel.
        rng: Where the draw comes from.
    """
    slots = LAYOUTS[num_panels][int(rng.integers(len(LAYOUTS[num_panels])))]
    margin = int(rng.integers(0, max(grid) // MAX_MARGIN + 1))
    extent = [count * side + (count + 1) * margin for count, side in zip(slots, grid, strict=True)]
    side = max(extent)
    top, left = (int(rng.integers(0, side - length + 1)) + margin for length in extent)
    taken = np.sort(rng.permutation(slots[0] * slots[1])[:num_panels])
    places = tuple((int(slot) // slots[1], int(slot) % slots[1]) for slot in taken)
    corners = tuple((top + row * (grid.rows + margin), left + column * (grid.columns + margin)) for row, column in places)
    return Layout(side, slots, places, corners, MARGIN_COLOURS[int(rng.integers(len(MARGIN_COLOURS)))])


def cell_size(panels: Sequence[Panel], side: int, size: int) -> int:
    """Return the pixels per side of a canvas cell: as many as `size` allows, but no more than the coarsest panel has.

    Args:
        panels: The panels.
        side: Cells per side of the canvas.
        size: Largest side of the canvas in pixels.

    Raises:
        ValueError: `size` is less than one pixel per cell.
    """
    if size < side:
        raise ValueError(f"--size must be at least {side} px, one per cell of a canvas of {side} x {side} cells, got {size}.")
    stored = min(min(p.picture.height / p.grid.rows, p.picture.width / p.grid.columns) for p in panels)
    return max(1, min(size // side, int(stored)))


def has_square_cells(size: tuple[int, int], grid: Grid) -> bool:
    """Return whether a picture of height and width `size` can become a panel, whose cells are square, without being stretched."""
    ratio = size[0] * grid.columns / (size[1] * grid.rows)
    return 1 / SQUARE_CELLS <= ratio <= SQUARE_CELLS


def compose_picture(panels: Sequence[Panel], layout: Layout, cell: int) -> Image.Image:
    """Return the canvas, `layout.side * cell` pixels square."""
    canvas = Image.new("RGB", (layout.side * cell,) * 2, layout.colour)
    for panel, (top, left) in zip(panels, layout.corners, strict=True):
        size = (panel.grid.columns * cell, panel.grid.rows * cell)
        picture = panel.picture if panel.picture.size == size else panel.picture.resize(size, Image.Resampling.LANCZOS)
        canvas.paste(picture, (left * cell, top * cell))
    return canvas


def compose_points(points: np.ndarray, grid: Grid, corner: tuple[int, int], side: int) -> np.ndarray:
    """Return a panel's points on the canvas: u unchanged, v moved by the corner.

    Args:
        points: int64 [P, 2] of (u, v), v on `grid`.
        grid: The panel's grid.
        corner: Upper left cell of the panel on the canvas.
        side: Cells per side of the canvas.
    """
    rows, columns = np.divmod(points[:, 1].astype(np.int64), grid.columns)
    return np.stack([points[:, 0], (corner[0] + rows) * side + corner[1] + columns], axis=1)


def compose_mask(mask: np.ndarray, grid: Grid, corner: tuple[int, int], side: int, cell: int) -> np.ndarray:
    """Return a panel's mask over the canvas, uint8 [side * cell, side * cell] of 0 and 1; resized without mixing, where at all."""
    result = np.zeros((side * cell, side * cell), np.uint8)
    size = (grid.columns * cell, grid.rows * cell)
    drawn = np.asarray(Image.fromarray((mask > 0).astype(np.uint8)).resize(size, Image.Resampling.NEAREST))
    top, left = corner[0] * cell, corner[1] * cell
    result[top : top + size[1], left : left + size[0]] = drawn
    return result


def join_captions(prompts: Sequence[str], layout: Layout, rng: np.random.Generator) -> str:
    """Return one caption for the canvas; every panel's own caption stands in it word for word, without its full stop.

    Args:
        prompts: The panels' captions, in reading order.
        layout: Where the panels lie.
        rng: Draws one of three forms: joined by "and", a list of pictures, or a list with places.
    """
    captions = [prompt.strip().rstrip(".") for prompt in prompts]
    form = int(rng.integers(3))
    if form == 0:
        return f"{', '.join(captions[:-1])} and {captions[-1]}"
    if form == 1:
        return f"{len(captions)} pictures: {'; '.join(captions)}"
    placed = [f"{place_name(place, layout.slots)}: {caption}" for place, caption in zip(layout.places, captions, strict=True)]
    return f"{len(captions)} pictures; {'; '.join(placed)}"


def place_name(place: tuple[int, int], slots: tuple[int, int]) -> str:
    """Return a slot in words, such as "top left"."""
    rows = {1: ("",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}[slots[0]]
    columns = {1: ("",), 2: ("left", "right"), 3: ("left", "centre", "right")}[slots[1]]
    return f"{rows[place[0]]} {columns[place[1]]}".strip()
