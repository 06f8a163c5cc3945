"""Charts as plain SVG: lines of several series, rows of values, with intervals where they are known, and histograms."""

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mosaic.reports.figures import LINE_COLOURS, colour_name

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 34, 44
LEGEND_ROW, LEGEND_LETTERS = 18, 70
LETTER, PLOT, ROWS_TOP, ROW_HEIGHT = 6.6, 330, 44, 19  # of a chart of rows: px of a letter of a name, of the values, of a row
COLOURS = ("#7a7a85", *(colour_name(k) for k in range(len(LINE_COLOURS))))


class Point(NamedTuple):
    """A value with the ends of its interval, which are not numbers where none is known."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


class Series(NamedTuple):
    """Points joined by a line.

    Attributes:
        name: In the legend, cut where it is too long for a row; a series without a name is not in the legend.
        points: From left to right; those whose y is no number are left out.
        colour: Empty: by the position of the series in its chart, of which a series without points keeps its own.
        width: Of the line, px.
        dashes: Of the line, as SVG names them.
    """

    name: str
    points: Sequence[Point]
    colour: str = ""
    width: float = 2
    dashes: str = "none"


def line_chart(
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    level: tuple[str, float] | None = None,
    x_ticks: Sequence[float] = (),
    y_ticks: Sequence[float] = (),
    alt: str = "",
) -> str:
    """An SVG picture.

    Args:
        series: What to draw.
        title: Above the chart.
        x_label: Below it.
        y_label: At its left end.
        level: A name and a value to draw a dashed line at, such as chance.
        x_ticks: Values to write below the chart; none: all of up to twelve, or both ends and the middle.
        y_ticks: Values to write at its left end, the first and the last of which are the chart's ends; none: round ones.
        alt: What the chart shows, in words, for a chart inside a page; none: the chart is a file of its own.
    """
    drawn = [one._replace(colour=one.colour or COLOURS[number % len(COLOURS)]) for number, one in enumerate(series)]
    drawn = [one._replace(points=[point for point in one.points if not math.isnan(point.y)]) for one in drawn]
    drawn = [one for one in drawn if one.points]
    if not drawn:
        return _svg([_text(LEFT, 20, title, 15, "600"), _text(LEFT, TOP + 30, "nothing measured yet", 12)], HEIGHT, alt=alt)
    every = [point for one in drawn for point in one.points]
    xs = sorted({point.x for point in every})
    ys = [y for point in every for y in (point.y, point.low, point.high) if not math.isnan(y)] + ([level[1]] if level else [])
    y_ticks = y_ticks or nice_ticks(min(ys), max(ys))
    x_low, x_span, y_low, y_span = xs[0], (xs[-1] - xs[0]) or 1.0, y_ticks[0], (y_ticks[-1] - y_ticks[0]) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        left = LEFT + (x - x_low) / x_span * (WIDTH - LEFT - RIGHT)
        return left, HEIGHT - BOTTOM - (y - y_low) / y_span * (HEIGHT - TOP - BOTTOM)

    parts = [_text(LEFT, 20, title, 15, "600"), _text(WIDTH / 2, HEIGHT - 8, x_label, 12, anchor="middle"), _text(4, TOP - 2, y_label, 11)]
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts += [_line(LEFT, y, WIDTH - RIGHT, y, "#e2e2e8", 1), _text(LEFT - 6, y + 4, f"{tick:g}", 11, anchor="end")]
    for tick in x_ticks or (xs if len(xs) <= 12 else [x_low, x_low + x_span / 2, x_low + x_span]):
        parts.append(_text(place(tick, y_low)[0], HEIGHT - BOTTOM + 16, f"{tick:g}", 11, anchor="middle"))
    if level:
        _, y = place(x_low, level[1])
        parts += [_line(LEFT, y, WIDTH - RIGHT, y, "#555555", 1, "4 4"), _text(WIDTH - RIGHT, y - 4, level[0], 11, anchor="end")]
    row = HEIGHT
    for one in drawn:
        parts += _curve(one, place)
        if one.name:
            name = one.name if len(one.name) <= LEGEND_LETTERS else one.name[: LEGEND_LETTERS - 1] + "…"
            parts += [_line(LEFT, row + 4, LEFT + 22, row + 4, one.colour, 3, one.dashes), _text(LEFT + 30, row + 8, name, 12)]
            row += LEGEND_ROW
    return _svg(parts, row + 6, alt=alt)


def _curve(series: Series, place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(point.x, point.y) for point in series.points))
    dashes = "" if series.dashes == "none" else f' stroke-dasharray="{series.dashes}"'
    parts = [f'<polyline points="{line}" fill="none" stroke="{series.colour}" stroke-width="{series.width}"{dashes}/>']
    for point in series.points:
        x, y = place(point.x, point.y)
        if len(series.points) <= 12:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{series.colour}"/>')
        if not math.isnan(point.low):
            parts.append(_line(x, place(point.x, point.low)[1], x, place(point.x, point.high)[1], series.colour, 1))
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


class Bar(NamedTuple):
    """A bar of a histogram.

    Attributes:
        low: Where it begins.
        high: Where it ends.
        counts: What is stacked in it, from below.
    """

    low: float
    high: float
    counts: tuple[int, ...]


def histogram_chart(
    bars: Sequence[Bar],
    title: str,
    y_label: str,
    names: Sequence[str],
    marks: Sequence[tuple[str, float]] = (),
    logarithmic: bool = False,
    alt: str = "",
) -> str:
    """An SVG picture of bars side by side.

    Args:
        bars: From left to right; all have as many counts as there are names.
        title: Above the chart.
        y_label: At its left end.
        names: What the counts are, from below; the first has the strongest colour, and the others are lighter.
        marks: Names and values to draw a dashed line at, such as limits.
        logarithmic: Whether the axis is; all values must be positive then.
        alt: As of `line_chart`.
    """
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    left, right = scale(bars[0].low), scale(bars[-1].high)
    y_ticks = nice_ticks(0, max(1, *(sum(bar.counts) for bar in bars)))
    x_ticks = [tick for tick in nice_ticks(left, right) if left <= tick <= right and (not logarithmic or tick == round(tick))]
    floor, colours = HEIGHT - BOTTOM, (colour_name(1), "#b9bcc6", "#dfe1e6")

    def x_of(value: float) -> float:
        return LEFT + (scale(value) - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def height_of(count: float) -> float:
        return count / y_ticks[-1] * (floor - TOP)

    parts = [_text(LEFT, 20, title, 15, "600"), _text(4, 20, y_label, 11)]
    for tick in y_ticks:
        y = floor - height_of(tick)
        parts += [_line(LEFT, y, WIDTH - RIGHT, y, "#e2e2e8", 1), _text(LEFT - 6, y + 4, f"{tick:g}", 11, anchor="end")]
    for value in (10**tick if logarithmic else tick for tick in x_ticks):
        parts.append(_text(x_of(value), floor + 16, f"{value:g}", 11, anchor="middle"))
    for bar in bars:
        y, x = float(floor), x_of(bar.low)
        for count, colour in zip(bar.counts, colours, strict=False):
            y -= height_of(count)
            size = f'width="{max(0.5, x_of(bar.high) - x - 1):.1f}" height="{height_of(count):.1f}"'
            parts += [f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="{colour}"/>'] if count else []
    for number, (name, value) in enumerate(marks):
        x, anchor = x_of(value), "start" if x_of(value) < WIDTH / 2 else "end"
        parts.append(_line(x, TOP - 4, x, floor, "#22242a", 1.5, "4 3"))
        parts.append(_text(x + (4 if anchor == "start" else -4), TOP + 8 + 14 * number, name, 11, "600", anchor))
    for number, (name, colour) in enumerate(zip(names, colours, strict=False)):
        x = LEFT + 150 * number
        parts += [f'<rect x="{x}" y="{HEIGHT - 18}" width="11" height="11" fill="{colour}"/>', _text(x + 16, HEIGHT - 8, name, 12)]
    return _svg(parts, HEIGHT, alt=alt)


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


def _svg(parts: Sequence[str], height: float, width: float = WIDTH, alt: str = "") -> str:
    kind = f'class="chart" role="img" aria-label="{html.escape(alt)}"' if alt else 'xmlns="http://www.w3.org/2000/svg"'
    head = f'<svg {kind} width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{width:g}" height="{height:g}" fill="white"/>', *parts, "</svg>"]) + "\n"
