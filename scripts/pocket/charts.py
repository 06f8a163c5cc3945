"""Charts as plain SVG: lines of several series, and rows of values; with intervals where they are known."""

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 34, 44
LEGEND_ROW = 18
LETTER, PLOT, ROWS_TOP, ROW_HEIGHT = 6.6, 330, 44, 19  # of a chart of rows: px of a letter of a name, of the values, of a row
COLOURS = ("#7a7a85", "#e63946", "#1d78d8", "#2ea043", "#f49406", "#8e44ad", "#00a0a0")


class Point(NamedTuple):
    """A value with the ends of its interval, which are not numbers where none is known."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


def line_chart(series: dict[str, Sequence[Point]], title: str, x_label: str, y_label: str, level: tuple[str, float] | None = None) -> str:
    """An SVG picture.

    Args:
        series: Points by name, in the order of the colours, of which a series without points keeps its own; points whose y is no number
            are left out.
        title: Above the chart.
        x_label: Below it.
        y_label: At its left end.
        level: A name and a value to draw a dashed line at, such as chance.
    """
    drawn = {name: [point for point in points if not math.isnan(point.y)] for name, points in series.items()}
    every = [point for points in drawn.values() for point in points]
    if not every:
        return _svg([_text(LEFT, 20, title, 15, "600"), _text(LEFT, TOP + 30, "nothing measured yet", 12)], HEIGHT)
    xs = [point.x for point in every]
    ys = [y for point in every for y in (point.y, point.low, point.high) if not math.isnan(y)] + ([level[1]] if level else [])
    ticks = nice_ticks(min(ys), max(ys))
    x_low, x_span, y_low, y_span = min(xs), (max(xs) - min(xs)) or 1.0, ticks[0], ticks[-1] - ticks[0]

    def place(x: float, y: float) -> tuple[float, float]:
        left = LEFT + (x - x_low) / x_span * (WIDTH - LEFT - RIGHT)
        return left, HEIGHT - BOTTOM - (y - y_low) / y_span * (HEIGHT - TOP - BOTTOM)

    parts = [_text(LEFT, 20, title, 15, "600"), _text(WIDTH / 2, HEIGHT - 8, x_label, 12, anchor="middle"), _text(4, TOP - 2, y_label, 11)]
    for tick in ticks:
        _, y = place(x_low, tick)
        parts += [_line(LEFT, y, WIDTH - RIGHT, y, "#e2e2e8", 1), _text(LEFT - 6, y + 4, f"{tick:g}", 11, anchor="end")]
    for x in sorted(set(xs)) if len(set(xs)) <= 12 else [x_low, x_low + x_span / 2, x_low + x_span]:
        parts.append(_text(place(x, y_low)[0], HEIGHT - BOTTOM + 16, f"{x:g}", 11, anchor="middle"))
    if level:
        _, y = place(x_low, level[1])
        parts += [_line(LEFT, y, WIDTH - RIGHT, y, "#555555", 1, "4 4"), _text(WIDTH - RIGHT, y - 4, level[0], 11, anchor="end")]
    shown = [(COLOURS[number % len(COLOURS)], name, points) for number, (name, points) in enumerate(drawn.items()) if points]
    for number, (colour, name, points) in enumerate(shown):
        parts += _series(points, colour, place)
        row = HEIGHT + number * LEGEND_ROW
        parts += [_line(LEFT, row + 4, LEFT + 22, row + 4, colour, 3), _text(LEFT + 30, row + 8, name, 12)]
    return _svg(parts, HEIGHT + len(shown) * LEGEND_ROW + 6)


def _series(points: Sequence[Point], colour: str, place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(point.x, point.y) for point in points))
    parts = [f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for point in points:
        x, y = place(point.x, point.y)
        if len(points) <= 12:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        if not math.isnan(point.low):
            parts.append(_line(x, place(point.x, point.low)[1], x, place(point.x, point.high)[1], colour, 1))
    return parts


class Row(NamedTuple):
    """A named value with the ends of its interval.

    Attributes:
        group: Rows of one group share a colour.
        name: At the row's left end.
        point: `x` is the value, `low` and `high` are its ends; `y` is not looked at.
    """

    group: str
    name: str
    point: Point


def row_chart(rows: Sequence[Row], title: str, x_label: str) -> str:
    """An SVG picture of values one below the other, with a dashed line at the first of them, to which the others are compared."""
    drawn = [row for row in rows if not math.isnan(row.point.x)]
    if not drawn:
        return _svg([_text(4, 20, title, 15, "600"), _text(4, ROWS_TOP, "nothing measured yet", 12)], ROWS_TOP + 42)
    names, height = round(LETTER * max(len(row.name) for row in drawn)) + 12, ROWS_TOP + len(drawn) * ROW_HEIGHT
    parts = [_text(4, 20, title, 15, "600"), _text(names + PLOT / 2, height + 34, x_label, 12, anchor="middle")]
    values = [x for row in drawn for x in (row.point.x, row.point.low, row.point.high) if not math.isnan(x)]
    ticks = nice_ticks(min(values), max(values))

    def place(x: float) -> float:
        return names + (x - ticks[0]) / (ticks[-1] - ticks[0]) * PLOT

    for tick in ticks:
        parts += [_line(place(tick), ROWS_TOP - 6, place(tick), height, "#e2e2e8", 1)]
        parts += [_text(place(tick), height + 16, f"{tick:g}", 11, anchor="middle")]
    parts.append(_line(place(drawn[0].point.x), ROWS_TOP - 6, place(drawn[0].point.x), height, "#555555", 1, "4 4"))
    groups = list(dict.fromkeys(row.group for row in drawn))
    for number, row in enumerate(drawn):
        y, colour = ROWS_TOP + (number + 0.5) * ROW_HEIGHT, COLOURS[groups.index(row.group) % len(COLOURS)]
        parts.append(_text(names - 8, y + 4, row.name, 12, anchor="end"))
        if not math.isnan(row.point.low):
            parts.append(_line(place(row.point.low), y, place(row.point.high), y, colour, 2))
        parts.append(f'<circle cx="{place(row.point.x):.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
    return _svg(parts, height + 42, names + PLOT + RIGHT)


def nice_ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers in equal steps that enclose low and high."""
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def _text(x: float, y: float, text: str, size: int, weight: str = "400", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _line(x0: float, y0: float, x1: float, y1: float, colour: str, width: float, dashes: str = "none") -> str:
    where = f'x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
    return f'<line {where} stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dashes}"/>'


def _svg(parts: Sequence[str], height: float, width: float = WIDTH) -> str:
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{width:g}" height="{height:g}" fill="white"/>', *parts, "</svg>"]) + "\n"
