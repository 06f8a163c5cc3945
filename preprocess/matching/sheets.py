"""Correspondences for the eye: every reference beside the target, lines between matched cells."""

from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from mosaic.method.grids import Grid
from mosaic.reports.figures import LINE_COLOURS, MARGIN, TILE, draw_line, tile, token_position

NUM_LINES = 10


def correspondence_panel(
    target: Image.Image,
    references: Sequence[Image.Image],
    points: Sequence[Tensor],
    target_grid: Grid,
    reference_grids: Sequence[Grid],
    num_lines: int = NUM_LINES,
) -> Image.Image:
    """One row per reference: its picture, the target, and lines for points spread evenly over all of them.

    Args:
        target: Any size.
        references: K pictures of any size.
        points: Per reference int [P_k, 2] of (u, v).
        target_grid: Grid of v.
        reference_grids: Per reference the grid of u.
        num_lines: Lines per reference at most.
    """
    canvas = Image.new("RGB", (2 * TILE + 3 * MARGIN, len(references) * (TILE + MARGIN) + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for k, (reference, pairs, grid) in enumerate(zip(references, points, reference_grids, strict=True)):
        left, right = (MARGIN, MARGIN + k * (TILE + MARGIN)), (2 * MARGIN + TILE, MARGIN + k * (TILE + MARGIN))
        canvas.paste(tile(reference), left)
        canvas.paste(tile(target), right)
        for number in range(min(num_lines, len(pairs))):  # the middles of equal parts of the list
            u, v = pairs[(2 * number + 1) * len(pairs) // (2 * min(num_lines, len(pairs)))].tolist()
            start, end = token_position(u, grid, reference.size, left), token_position(v, target_grid, target.size, right)
            draw_line(draw, start, end, LINE_COLOURS[number % len(LINE_COLOURS)])
    return canvas
