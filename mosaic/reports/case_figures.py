"""Figures of a case's page: lines from reference points to peaks, heat maps, the curves of the entropy.

Numbers come from `mosaic.pipeline.attention_report.attention_numbers`; templates/figures.html.jinja draws what is worked out here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from mosaic.method.grids import Grid
from mosaic.reports.charts import Point, Series, line_chart
from mosaic.reports.figures import colour_name, heat_map

SIDE = 260  # px, of a picture in a figure
GAP = 70  # px between reference and result
RADIUS = 11  # px, of a point
EDGE = 14  # px around a figure, for points at its border
HEAT_SIDE = 2 * SIDE  # px of the picture file, for dense screens
DASHES = ("none", "9 5", "2 4", "12 4 2 4", "5 3", "16 6")
NUM_STEP_LABELS = 5

Place = tuple[float, float]  # (x, y) in px of a figure


class DrawnLine(NamedTuple):
    """A line from a token of a reference to a token of the result, both (row, column), with its ends in the figure."""

    letter: str
    point: Sequence[int]
    peak: Sequence[int]
    weight: float
    start: Place
    end: Place


class LinesFigure(NamedTuple):
    """A reference beside the result, with lines between points and peaks.

    Attributes:
        lines: What is drawn.
        rings: (letter, x, y) at both ends of every line.
        dashes: Of the lines, as SVG names them.
        side: Of each picture, px.
        width: From the left end of the reference to the right end of the result, px.
        edge: Around both, px.
        radius: Of a ring, px.
    """

    lines: list[DrawnLine]
    rings: list[tuple[str, float, float]]
    dashes: str
    side: int = SIDE
    width: int = 2 * SIDE + GAP
    edge: int = EDGE
    radius: int = RADIUS


class HeatFigure(NamedTuple):
    """The result in grey under a subject's mean row.

    Attributes:
        picture: The heat map.
        view: Left, top, width and height of what is shown of its square, px.
        token: (row, column) of the row's maximum.
        centre: Of that token in the figure.
        weight: The row's value there, a share of 1.
        side: Of the square, px.
    """

    picture: Image.Image
    view: list[float]
    token: tuple[int, int]
    centre: Place
    weight: float
    side: int = SIDE


def lines_figure(k: int, numbers: Mapping[str, Any], result_size: tuple[int, int]) -> LinesFigure:
    """Reference k and the result, of (width, height) px, with the lines of that reference."""
    reference_box, result_box = (0, 0, SIDE, SIDE), _fitted(result_size, SIDE + GAP)
    lines: list[DrawnLine] = []
    for line in numbers["lines"]:
        if line["reference"] == k:
            start = _centre(line["point"], numbers["reference_grid"], reference_box)
            end = _centre(line["peak"], numbers["target_grid"], result_box)
            lines.append(DrawnLine(_letter(len(lines)), line["point"], line["peak"], line["weight"], start, end))
    return LinesFigure(lines, _rings(lines), DASHES[k % len(DASHES)])


def heat_figure(result: Image.Image, distribution: Tensor, grid: Grid) -> HeatFigure:
    """The result under a row [N_tgt] of the grid's attention."""
    darkest = int(distribution.argmax())
    token = divmod(darkest, grid.columns)
    box = left, top, width, height = _fitted(result.size, 0)
    view = [round(length, 1) for length in (left - EDGE, top - EDGE, width + 2 * EDGE, height + 2 * EDGE)]
    picture = heat_map(result, distribution, grid, HEAT_SIDE)
    return HeatFigure(picture, view, token, _centre(token, grid, box), float(distribution[darkest]))


def entropy_chart(labels: Sequence[str], numbers: Mapping[str, Any]) -> str:
    """Attention entropy over the sampling steps as SVG: one curve per reference; the dashed line is attention spread evenly."""
    entropy, limit = numbers["entropy"], numbers["uniform_entropy"]
    curves = [[Point(step, row[k]) for step, row in enumerate(entropy, 1)] for k in range(len(labels))]
    series = [
        Series(f"{k + 1} {labels[k]}", curve, colour_name(k), width=2.5, dashes=DASHES[k % len(DASHES)]) for k, curve in enumerate(curves)
    ]
    told = "; ".join(
        f"reference {k}: {curve[0].y:.2f} at the first step, {curve[-1].y:.2f} at the last" for k, curve in enumerate(curves, 1)
    )
    alt = f"Entropy in nats over the sampling steps. {told}. Attention spread evenly has {limit:.2f}."
    steps = sorted({1 + part * (len(entropy) - 1) // (NUM_STEP_LABELS - 1) for part in range(NUM_STEP_LABELS)})
    level, nats = (f"even: {limit:.2f}", limit), range(math.ceil(limit) + 1)
    return line_chart(series, "", "sampling step", "nats", level, x_ticks=steps, y_ticks=nats, alt=alt)


def _letter(number: int) -> str:
    """Names of lines: a, b, ..., z, a2, b2, ..."""
    return chr(ord("a") + number % 26) + ("" if number < 26 else str(number // 26 + 1))


def _rings(lines: Sequence[DrawnLine]) -> list[tuple[str, float, float]]:
    """A ring at both ends of every line; one that would cover another stands beside its end."""
    rings: list[tuple[str, float, float]] = []
    for line in lines:
        for x, y in (line.start, line.end):
            while any((x - a) ** 2 + (y - b) ** 2 < (1.5 * RADIUS) ** 2 for _, a, b in rings):
                x = round(x + 1.6 * RADIUS, 1)
            rings.append((line.letter, x, y))
    return rings


def _fitted(size: tuple[int, int], left: float) -> tuple[float, float, float, float]:
    """Left, top, width, height of a picture of (width, height) px, fitted into the square of a figure that begins at `left`."""
    scale = SIDE / max(size)
    width, height = size[0] * scale, size[1] * scale
    return left + (SIDE - width) / 2, (SIDE - height) / 2, width, height


def _centre(token: Sequence[int], grid: Sequence[int], box: tuple[float, float, float, float]) -> Place:
    """The centre of a token (row, column) of a grid (rows, columns) laid over a box."""
    left, top, width, height = box
    return round(left + (token[1] + 0.5) / grid[1] * width, 1), round(top + (token[0] + 0.5) / grid[0] * height, 1)
