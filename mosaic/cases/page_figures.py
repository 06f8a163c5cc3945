"""The figures of a case's page, as HTML and SVG: lines from reference points to peaks, heat maps, leakage matrix, entropy over the steps.

Colour only repeats what numbers, letters and dash patterns say. Numbers come from `mosaic.attention_report.attention_numbers`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from mosaic.figures import LINE_COLOURS, heat_map
from mosaic.pages import png_uri, text
from mosaic.tokens import Grid

SIDE = 260  # px, of a picture in a figure
GAP = 70  # px between reference and result
RADIUS = 11  # px, of a point
HEAT_SIDE = 2 * SIDE  # px of the picture file, for dense screens
DASHES = ("", "9 5", "2 4", "12 4 2 4", "5 3", "16 6")
CHART = (760, 340)  # px
CHART_MARGINS = (56, 190, 18, 46)  # px: left, right (labels), top, bottom
LABEL_DISTANCE = 19  # px between the labels of two curves


def colour(k: int) -> str:
    """The colour of reference k."""
    return "#{:02x}{:02x}{:02x}".format(*LINE_COLOURS[k % len(LINE_COLOURS)])


def badge(k: int) -> str:
    """The number of reference k in a ring of its colour."""
    return f'<span class="badge" style="border-color:{colour(k)}">{k + 1}</span>'


def percent(share: float) -> str:
    """A share of 1 as text for a page; small ones are not rounded to nothing."""
    return "&lt;1&nbsp;%" if 0 < share < 0.005 else f"{100 * share:.0f}&nbsp;%"


def name_of(label: str) -> str:
    """A reference's label as HTML that may break after an underscore."""
    return f'<span class="name">{text(label).replace("_", "_<wbr>")}</span>'


def place(token: Sequence[int]) -> str:
    """A token's (row, column) as text, counted from 1."""
    return f"row {token[0] + 1}, column {token[1] + 1}"


def symbols(pictures: Sequence[tuple[str, Image.Image]]) -> str:
    """Pictures that other figures show by their ids, each embedded once."""
    parts = []
    for name, picture in pictures:
        look = ' style="image-rendering:pixelated"' if max(picture.size) * 2 <= SIDE else ""
        parts.append(
            f'<symbol id="{name}" viewBox="0 0 {picture.width} {picture.height}">'
            f'<image width="{picture.width}" height="{picture.height}" href="{png_uri(picture)}"{look}/></symbol>'
        )
    return f'<svg class="symbols" width="0" height="0" aria-hidden="true" focusable="false">{"".join(parts)}</svg>'


def shown(name: str, alt: str) -> str:
    """A picture of `symbols`."""
    return f'<svg class="picture" viewBox="0 0 100 100" role="img" aria-label="{text(alt)}"><use href="#{name}" width="100" height="100"/></svg>'


def lines_figure(k: int, label: str, lines: Sequence[dict[str, Any]], numbers: dict[str, Any], result_size: tuple[int, int]) -> str:
    """The reference beside the result, with lines between points and peaks, each end marked by the line's letter."""
    wide, marks = 2 * SIDE + GAP, []
    boxes = (0, 0, SIDE, SIDE), _fitted(result_size, SIDE + GAP)
    ends = [(_centre(line["point"], numbers["reference_grid"], boxes[0]), _centre(line["peak"], numbers["target_grid"], boxes[1])) for line in lines]
    for (x, y), (to_x, to_y) in ends:
        path = f'x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"'
        marks.append(f'<line {path} stroke="#fff" stroke-width="5" opacity=".85"/>')
        marks.append(f'<line {path} stroke="{colour(k)}" stroke-width="2.5" stroke-dasharray="{DASHES[k % len(DASHES)]}"/>')
    taken: list[tuple[float, float]] = []
    for letter, pair in zip(letters(), ends, strict=False):
        for x, y in pair:
            x, y = _beside(x, y, taken)
            taken.append((x, y))
            marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}" fill="#fff" stroke="{colour(k)}" stroke-width="3"/>')
            marks.append(f'<text x="{x:.1f}" y="{y + 4.5:.1f}" text-anchor="middle" font-size="13" font-weight="700" fill="#22242a">{letter}</text>')
    told = "; ".join(
        f"{letter}: {place(line['point'])} to {place(line['peak'])}, {100 * line['weight']:.0f} %"
        for letter, line in zip(letters(), lines, strict=False)
    )
    alt = f"Reference {k + 1}, {label}, at the left and the result at the right, with a line from each point to the peak of its attention. {told}."
    return (
        f'<svg class="lines" viewBox="-14 -14 {wide + 28} {SIDE + 28}" role="img" aria-label="{text(alt)}">'
        f'<rect width="{SIDE}" height="{SIDE}" fill="#fff" stroke="#dfe1e6"/><use href="#reference{k}" width="{SIDE}" height="{SIDE}"/>'
        f'<use href="#result" x="{SIDE + GAP}" width="{SIDE}" height="{SIDE}"/>{"".join(marks)}</svg>'
    )


def letters() -> Iterator[str]:
    """Names of lines: a, b, ..., z, a2, b2, ..."""
    number = 0
    while True:
        yield chr(ord("a") + number % 26) + ("" if number < 26 else str(number // 26 + 1))
        number += 1


def heat_figure(k: int, label: str, result: Image.Image, distribution: Tensor, grid: Grid) -> str:
    """The result in grey under the subject's mean row, its maximum ringed, with the scale."""
    top = int(distribution.argmax())
    weight, token = float(distribution[top]), (top // grid.columns, top % grid.columns)
    x, y = _centre(token, grid, _fitted(result.size, 0))
    alt = (
        f"Heat map of the attention of reference {k + 1}, {label}, over the result. The darkest token, ringed, is {place(token)} with "
        f"{100 * weight:.1f} % of the attention."
    )
    ring = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="14" fill="none" stroke="{ink}" stroke-width="{w}"/>' for ink, w in (("#fff", 6), ("#22242a", 2.5)))
    return (
        f'<svg class="heat" viewBox="-14 -14 {SIDE + 28} {SIDE + 28}" role="img" aria-label="{text(alt)}">'
        f'<image width="{SIDE}" height="{SIDE}" href="{png_uri(heat_map(result, distribution, grid, HEAT_SIDE))}"/>{ring}</svg>'
        f'<p class="scale"><span>0</span><span class="bar"></span><span>{100 * weight:.1f} % in one token</span></p>'
    )


def leakage_table(labels: Sequence[str], numbers: dict[str, Any]) -> str:
    """The K x K matrix, with what lies on nobody's tokens and what a uniform row would give."""
    count = range(len(labels))
    head = "".join(f'<th scope="col"><span class="who">{badge(k)}{name_of(labels[k])}</span></th>' for k in count)
    rows = []
    for i, row in zip(count, numbers["leakage"], strict=True):
        cells = "".join(_cell(share, "own" if i == j else "") for j, share in enumerate(row))
        rest = max(0.0, 1 - sum(row))
        rows.append(f'<tr><th scope="row"><span class="who">{badge(i)}{name_of(labels[i])}</span></th>{cells}{_cell(rest, "rest")}</tr>')
    owned = numbers["owned"]
    uniform = "".join(f"<td>{percent(share)}</td>" for share in [*owned, max(0.0, 1 - sum(owned))])
    return (
        '<div class="scroll"><table class="leakage"><caption>Row: whose attention. Column: whose tokens of the picture it lies on. Rows sum to '
        f'100 %.</caption><thead><tr><td></td>{head}<th scope="col">nobody’s</th></tr></thead><tbody>{"".join(rows)}</tbody>'
        f'<tfoot><tr><th scope="row">even attention<br>would give</th>{uniform}</tr></tfoot></table></div>'
    )


def entropy_chart(labels: Sequence[str], numbers: dict[str, Any]) -> str:
    """One curve per reference, named at its end; the dashed line is attention spread evenly."""
    left, right, top, bottom = CHART_MARGINS
    width, height = CHART[0] - left - right, CHART[1] - top - bottom
    entropy, limit = numbers["entropy"], numbers["uniform_entropy"]
    steps, highest = len(entropy), max(limit, 1e-9) * 1.04

    def at(step: int, value: float) -> tuple[float, float]:
        return left + (step / max(steps - 1, 1)) * width, top + height * (1 - value / highest)

    parts = []
    for tick in range(int(limit) + 1):
        y = at(0, tick)[1]
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e6e7eb"/>')
        parts.append(f'<text x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
    for step in sorted({round(part * (steps - 1) / 4) for part in range(5)}):
        parts.append(f'<text x="{at(step, 0)[0]:.1f}" y="{CHART[1] - bottom + 20}" text-anchor="middle">{step + 1}</text>')
    y = at(0, limit)[1]
    parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#5b606b" stroke-width="1.5" stroke-dasharray="3 4"/>')
    curves = [[row[k] for row in entropy] for k in range(len(labels))]
    heights = _apart([y, *(at(0, curve[-1])[1] for curve in curves)])
    parts.append(f'<text x="{left + width + 14}" y="{heights[0] + 4:.1f}">even: {limit:.2f}</text>')
    for k, (curve, name_y) in enumerate(zip(curves, heights[1:], strict=True)):
        path = " ".join("{:.1f},{:.1f}".format(*at(step, value)) for step, value in enumerate(curve))
        x, y = at(steps - 1, curve[-1])
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour(k)}" stroke-width="2.5" stroke-dasharray="{DASHES[k % len(DASHES)]}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour(k)}"/>')
        parts.append(f'<line x1="{x + 5:.1f}" y1="{y:.1f}" x2="{x + 12:.1f}" y2="{name_y:.1f}" stroke="{colour(k)}"/>')
        parts.append(f'<text x="{left + width + 14}" y="{name_y + 4:.1f}"><tspan font-weight="700">{k + 1}</tspan> {text(_short(labels[k]))}</text>')
    told = "; ".join(f"reference {k + 1}: {curve[0]:.2f} at the first step, {curve[-1]:.2f} at the last" for k, curve in enumerate(curves))
    alt = f"Entropy in nats over the sampling steps. {told}. Attention spread evenly has {limit:.2f}."
    axes = f'<text x="{left + width / 2}" y="{CHART[1] - 6}" text-anchor="middle">sampling step</text><text x="{left - 10}" y="{top - 4}" text-anchor="end">nats</text>'
    return f'<svg class="chart" viewBox="0 0 {CHART[0]} {CHART[1]}" role="img" aria-label="{text(alt)}">{"".join(parts)}{axes}</svg>'


def _cell(share: float, kind: str) -> str:
    """A cell of the matrix, darker with its share; its letters stay readable."""
    shade = f"rgba(29,78,137,{min(share, 1) ** 0.8 * 0.92:.2f})" if kind != "rest" else "transparent"
    ink = ";color:#fff" if kind != "rest" and share > 0.75 else ""
    return f'<td class="{kind}" style="background:{shade}{ink}">{percent(share)}</td>'


def _fitted(size: tuple[int, int], left: float) -> tuple[float, float, float, float]:
    """Left, top, width, height of a picture of (width, height) px, fitted into the square of a figure that begins at `left`."""
    scale = SIDE / max(size)
    width, height = size[0] * scale, size[1] * scale
    return left + (SIDE - width) / 2, (SIDE - height) / 2, width, height


def _centre(token: Sequence[int], grid: Sequence[int], box: tuple[float, float, float, float]) -> tuple[float, float]:
    """(x, y) of the centre of a token (row, column) of a grid (rows, columns) laid over a box."""
    left, top, width, height = box
    return left + (token[1] + 0.5) / grid[1] * width, top + (token[0] + 0.5) / grid[0] * height


def _beside(x: float, y: float, taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The place itself, or where it is taken the next one to the right that is not."""
    while any((x - a) ** 2 + (y - b) ** 2 < (1.5 * RADIUS) ** 2 for a, b in taken):
        x += 1.6 * RADIUS
    return x, y


def _apart(heights: Sequence[float]) -> list[float]:
    """The heights, moved as little as a walk from top to bottom and back allows, so that any two differ by LABEL_DISTANCE."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    moved, lowest = list(heights), CHART[1] - CHART_MARGINS[3] + 4.0
    for before, index in zip(order, order[1:], strict=False):
        moved[index] = max(moved[index], moved[before] + LABEL_DISTANCE)
    for index in reversed(order):
        moved[index] = min(moved[index], lowest)
        lowest = moved[index] - LABEL_DISTANCE
    return moved


def _short(label: str, letters: int = 20) -> str:
    return label if len(label) <= letters else label[: letters - 1] + "…"
