"""Figures of a case's page, as HTML and SVG: lines from reference points to peaks, heat maps, the leakage matrix.

Colour only repeats what numbers, letters and dash patterns say. Numbers come from `mosaic.pipeline.attention_report.attention_numbers`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from mosaic.method.grids import Grid
from mosaic.reports.figures import LINE_COLOURS, heat_map
from mosaic.reports.html import png_uri, text

SIDE = 260  # px, of a picture in a figure
GAP = 70  # px between reference and result
RADIUS = 11  # px, of a point
EDGE = 14  # px around a figure, for points at its border
HEAT_SIDE = 2 * SIDE  # px of the picture file, for dense screens
INK = "#22242a"
DASHES = ("", "9 5", "2 4", "12 4 2 4", "5 3", "16 6")


def colour(k: int) -> str:
    """The colour of reference k."""
    return "#{:02x}{:02x}{:02x}".format(*LINE_COLOURS[k % len(LINE_COLOURS)])


def badge(k: int) -> str:
    """The number of reference k in a ring of its colour."""
    return f'<span class="badge" style="border-color:{colour(k)}">{k + 1}</span>'


def named(k: int, label: str) -> str:
    """Number and label of reference k; the label may break after an underscore."""
    return f'<span class="who">{badge(k)}<span class="name">{text(label).replace("_", "_<wbr>")}</span></span>'


def percent(share: float) -> str:
    """A share of 1 as HTML; small ones are not rounded to nothing."""
    return "&lt;1&nbsp;%" if 0 < share < 0.005 else f"{100 * share:.0f}&nbsp;%"


def place(token: Sequence[int]) -> str:
    """A token's (row, column) as text, counted from 1."""
    return f"row {token[0] + 1}, column {token[1] + 1}"


def letters() -> Iterator[str]:
    """Names of lines: a, b, ..., z, a2, b2, ..."""
    number = 0
    while True:
        yield chr(ord("a") + number % 26) + ("" if number < 26 else str(number // 26 + 1))
        number += 1


def symbols(pictures: Mapping[str, Image.Image]) -> str:
    """Pictures that other figures show by their ids, each embedded once."""
    parts = []
    for name, picture in pictures.items():
        look = ' style="image-rendering:pixelated"' if max(picture.size) * 2 <= SIDE else ""
        size = f'width="{picture.width}" height="{picture.height}"'
        parts.append(
            f'<symbol id="{name}" viewBox="0 0 {picture.width} {picture.height}"><image {size} href="{png_uri(picture)}"{look}/></symbol>'
        )
    return f'<svg class="symbols" width="0" height="0" aria-hidden="true" focusable="false">{"".join(parts)}</svg>'


def shown(name: str, alt: str) -> str:
    """A picture of `symbols`."""
    use = f'<use href="#{name}" width="100" height="100"/>'
    return f'<svg class="picture" viewBox="0 0 100 100" role="img" aria-label="{text(alt)}">{use}</svg>'


def lines_figure(k: int, label: str, lines: Sequence[Mapping[str, Any]], numbers: Mapping[str, Any], result_size: tuple[int, int]) -> str:
    """The reference beside the result, with lines between points and peaks, each end marked by the line's letter."""
    reference_box, result_box = (0, 0, SIDE, SIDE), _fitted(result_size, SIDE + GAP)
    ends = [
        (_centre(line["point"], numbers["reference_grid"], reference_box), _centre(line["peak"], numbers["target_grid"], result_box))
        for line in lines
    ]
    told = "; ".join(
        f"{letter}: {place(line['point'])} to {place(line['peak'])}, {100 * line['weight']:.0f} %"
        for letter, line in zip(letters(), lines, strict=False)
    )
    alt = (
        f"Reference {k + 1}, {label}, at the left and the result at the right, with a line from each point to the peak of its attention. "
        f"{told}."
    )
    strokes, marks = [_stroke(k, *pair) for pair in ends], _marks(k, ends)
    return (
        f'<svg class="lines" viewBox="{-EDGE} {-EDGE} {2 * SIDE + GAP + 2 * EDGE} {SIDE + 2 * EDGE}" role="img" aria-label="{text(alt)}">'
        f'<rect width="{SIDE}" height="{SIDE}" fill="#fff" stroke="#dfe1e6"/><use href="#reference{k}" width="{SIDE}" height="{SIDE}"/>'
        f'<use href="#result" x="{SIDE + GAP}" width="{SIDE}" height="{SIDE}"/>{"".join([*strokes, *marks])}</svg>'
    )


def heat_figure(k: int, label: str, result: Image.Image, distribution: Tensor, grid: Grid) -> str:
    """The result in grey under the subject's mean row, its maximum ringed, with the scale."""
    darkest = int(distribution.argmax())
    weight, token = 100 * float(distribution[darkest]), divmod(darkest, grid.columns)
    box = left, top, width, height = _fitted(result.size, 0)
    x, y = _centre(token, grid, box)
    alt = (
        f"Heat map of the attention of reference {k + 1}, {label}, over the result. The darkest token, ringed, is {place(token)} with "
        f"{weight:.1f} % of the attention."
    )
    circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="14" fill="none"'
    ring = f'{circle} stroke="#fff" stroke-width="6"/>{circle} stroke="{INK}" stroke-width="2.5"/>'
    return (
        f'<svg class="heat" viewBox="{left - EDGE:.1f} {top - EDGE:.1f} {width + 2 * EDGE:.1f} {height + 2 * EDGE:.1f}" role="img" '
        f'aria-label="{text(alt)}">'
        f'<image width="{SIDE}" height="{SIDE}" href="{png_uri(heat_map(result, distribution, grid, HEAT_SIDE))}"/>{ring}</svg>'
        f'<p class="scale"><span>0</span><span class="bar"></span><span>{weight:.1f}&nbsp;% in one token</span></p>'
    )


def leakage_table(labels: Sequence[str], numbers: Mapping[str, Any]) -> str:
    """The K x K matrix, with what lies on nobody's tokens and what a uniform row would give."""
    head = "".join(f'<th scope="col">{named(k, label)}</th>' for k, label in enumerate(labels))
    rows = []
    for i, row in enumerate(numbers["leakage"]):
        cells = "".join(_cell(share, "own" if i == j else "other") for j, share in enumerate(row))
        rows.append(f'<tr><th scope="row">{named(i, labels[i])}</th>{cells}<td class="rest">{percent(_rest(row))}</td></tr>')
    uniform = "".join(f"<td>{percent(share)}</td>" for share in [*numbers["owned"], _rest(numbers["owned"])])
    return (
        '<div class="scroll"><table class="leakage"><caption>Row: whose attention. Column: whose tokens of the picture it lies on. Rows '
        f'sum to 100 %.</caption><thead><tr><td></td>{head}<th scope="col">nobody&rsquo;s</th></tr></thead><tbody>{"".join(rows)}</tbody>'
        f'<tfoot><tr><th scope="row">even attention<br>would give</th>{uniform}</tr></tfoot></table></div>'
    )


def _rest(shares: Sequence[float]) -> float:
    """What shares lack to 1; the last digit of rounded ones may be too much."""
    return max(0.0, 1 - sum(shares))


def _cell(share: float, kind: str) -> str:
    """A cell of the matrix, darker with its share; its letters stay readable."""
    ink = ";color:#fff" if share > 0.75 else ""
    return f'<td class="{kind}" style="background:rgba(29,78,137,{min(share, 1) ** 0.8 * 0.92:.2f}){ink}">{percent(share)}</td>'


def _stroke(k: int, start: tuple[float, float], end: tuple[float, float]) -> str:
    """A line on a white rim."""
    line = f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
    dash = f'stroke-dasharray="{DASHES[k % len(DASHES)]}"'
    return f'{line} stroke="#fff" stroke-width="5" opacity=".85"/>{line} stroke="{colour(k)}" stroke-width="2.5" {dash}/>'


def _marks(k: int, ends: Sequence[tuple[tuple[float, float], tuple[float, float]]]) -> list[str]:
    """A dot and a letter in a ring at both ends of every line; a ring that would cover another stands beside its dot."""
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour(k)}" stroke="#fff"/>' for pair in ends for x, y in pair]
    marks, taken = dots, []
    for letter, pair in zip(letters(), ends, strict=False):
        for x, y in pair:
            while any((x - a) ** 2 + (y - b) ** 2 < (1.5 * RADIUS) ** 2 for a, b in taken):
                x += 1.6 * RADIUS
            taken.append((x, y))
            marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}" fill="#fff" stroke="{colour(k)}" stroke-width="3"/>')
            font = f'text-anchor="middle" font-size="13" font-weight="700" fill="{INK}"'
            marks.append(f'<text x="{x:.1f}" y="{y + 4.5:.1f}" {font}>{letter}</text>')
    return marks


def _fitted(size: tuple[int, int], left: float) -> tuple[float, float, float, float]:
    """Left, top, width, height of a picture of (width, height) px, fitted into the square of a figure that begins at `left`."""
    scale = SIDE / max(size)
    width, height = size[0] * scale, size[1] * scale
    return left + (SIDE - width) / 2, (SIDE - height) / 2, width, height


def _centre(token: Sequence[int], grid: Sequence[int], box: tuple[float, float, float, float]) -> tuple[float, float]:
    """(x, y) of the centre of a token (row, column) of a grid (rows, columns) laid over a box."""
    left, top, width, height = box
    return left + (token[1] + 0.5) / grid[1] * width, top + (token[0] + 0.5) / grid[0] * height
