"""The figures of an ablation, from its results file alone: learning curves, measures over K, points and their peaks."""

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mosaic.images import prepare_reference
from mosaic.method.grids import Grid
from mosaic.reports.charts import Point, Row, Series, line_chart, row_chart
from mosaic.reports.figures import CAPTION, INK, LINE_COLOURS, MARGIN, TILE, draw_line, tile, token_position
from scripts.ablation.tables import (
    ATTENTION_LEAKAGE,
    EXACT,
    IDENTIFICATION,
    LEAKAGE,
    NEAR,
    OVERLAP,
    Measure,
    Runs,
    by_arm,
    is_baseline,
    ks_of,
    value_of,
)
from scripts.ablation.tasks import LINES_K
from scripts.pocket import world
from scripts.pocket.evaluation import held_out_scenes, render_references

CURVES = {
    "loss/flow_matching": "flow matching loss",
    "loss/correspondence": "SCAL, nats",
    "loss/disentanglement": "MDL, nats",
    "attention/near": "attention within one token",
}
K_MEASURES: dict[str, Measure] = {
    "identification": IDENTIFICATION,
    "leakage": LEAKAGE,
    "attention_near": NEAR,
    "attention_exact": EXACT,
    "attention_leakage": ATTENTION_LEAKAGE,
    "overlap": OVERLAP,
}
OTHER_DEFINITIONS = ("release",)  # arms whose losses are of other blocks, and defined otherwise
LINES_PER_REFERENCE = 5
SCENE_SIZE = 64  # px


def charts(results: dict[str, Any]) -> dict[str, str]:
    """SVG text by file name."""
    arms = by_arm(results, "main")
    found = {}
    for name, label in CURVES.items():
        hidden = () if name == "loss/flow_matching" else OTHER_DEFINITIONS
        series = [Series(runs[0]["meaning"], [] if arm in hidden else mean_curve(runs, name)) for arm, runs in arms.items()]
        found[f"learning_{name.partition('/')[2]}.svg"] = line_chart(series, f"{label} during training", "step", "")
    ks = ks_of(list(arms.values()))
    for name, measure in K_MEASURES.items():
        series = [Series(runs[0]["meaning"], [Point(k, *value_of(measure, runs, k)) for k in ks]) for runs in arms.values()]
        chance = ("chance", 12.5) if measure is IDENTIFICATION else None
        title = f"{measure.title} (training saw K up to 4)"
        found[f"k_{name}.svg"] = line_chart(series, title, "number of references K", "", chance)
    return found


def factor_charts(results: dict[str, Any]) -> dict[str, str]:
    """SVG text by file name: identification of the one-factor variants at each K, the baseline first."""
    arms, found = by_arm(results, "factors"), {}
    for k in ks_of(list(arms.values())):
        rows = []
        for runs in arms.values():
            value = value_of(IDENTIFICATION, runs, k)
            name = "baseline" if is_baseline(runs) else f"{runs[0]['factor']}: {runs[0]['meaning']}"
            rows.append(Row(runs[0]["factor"], name, Point(value.mean, 0.0, value.low, value.high)))
        found[f"factors_k{k}.svg"] = row_chart(rows, f"One factor at a time, K = {k}", IDENTIFICATION.title)
    return found


def mean_curve(runs: Runs, name: str) -> list[Point]:
    """Mean over the seeds that have a value at a step."""
    values: dict[float, list[float]] = {}
    for run in runs:
        for step, value in run["curves"].get(name, []):
            values.setdefault(step, []).append(value)
    return [Point(step, sum(found) / len(found)) for step, found in sorted(values.items())]


def lines_figure(results: dict[str, Any]) -> Image.Image | None:
    """The analogue of Figure 6: per arm (seed 0), reference points with lines to the peaks of their rows in one held-out scene.

    Returns:
        One panel per arm, or None where no arm has points.
    """
    panels = []
    for runs in by_arm(results, "main").values():
        first = next((run for run in runs if run["seed"] == 0 and run["lines"]), None)
        if first:
            panels.append(lines_panel(first["lines"], f"{first['meaning']}: {peak_share(first['lines'])}"))
    if not panels:
        return None
    columns = 2
    canvas = Image.new("RGB", (columns * panels[0].width, -(-len(panels) // columns) * panels[0].height), "white")
    for index, panel in enumerate(panels):
        canvas.paste(panel, (index % columns * panel.width, index // columns * panel.height))
    return canvas


def peak_share(lines: dict[str, Any]) -> str:
    """How many of the points peak within one token of where they should."""
    columns = lines["target_columns"]
    near = [
        max(abs(v // columns - p // columns), abs(v % columns - p % columns)) <= 1 for v, p in zip(lines["v"], lines["peak"], strict=True)
    ]
    return f"{sum(near)} of {len(near)} points within one token"


def lines_panel(lines: dict[str, Any], caption: str) -> Image.Image:
    """References at the left, the scene at the right; a line from a point to its peak, and a cross where it should end."""
    num_references = LINES_K
    scene = held_out_scenes(num_references, 1)[0]
    side = TILE // 2
    target = world.render_scene(scene, SCENE_SIZE).image
    target_tile = 2 * TILE
    height = max(num_references * (side + MARGIN), target_tile + MARGIN) + MARGIN + CAPTION
    canvas = Image.new("RGB", (side + target_tile + 5 * MARGIN, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    draw.text((MARGIN, 6), caption, fill=INK, font=font)
    corner = (side + 4 * MARGIN, CAPTION + MARGIN)
    canvas.paste(tile(target, target_tile), corner)
    references = [prepare_reference(picture, world.REFERENCE_SIZE) for picture in render_references(scene)]
    target_grid = Grid(lines["target_columns"], lines["target_columns"])
    reference_side = math.isqrt(lines["reference_tokens"])
    reference_grid = Grid(reference_side, reference_side)
    for k, picture in enumerate(references):
        top = CAPTION + MARGIN + k * (side + MARGIN)
        canvas.paste(tile(picture, side), (MARGIN, top))
        for index in spread([i for i, owner in enumerate(lines["k"]) if owner == k], LINES_PER_REFERENCE):
            start = centre(lines["u"][index], reference_grid, (MARGIN, top), side)
            end = centre(lines["peak"][index], target_grid, corner, target_tile)
            x, y = centre(lines["v"][index], target_grid, corner, target_tile)
            draw_line(draw, start, end, LINE_COLOURS[k % len(LINE_COLOURS)])
            for width, colour in ((6, INK), (3, LINE_COLOURS[k % len(LINE_COLOURS)])):
                draw.line([x - 8, y, x + 8, y], fill=colour, width=width)
                draw.line([x, y - 8, x, y + 8], fill=colour, width=width)
    return canvas


def spread(indices: Sequence[int], count: int) -> list[int]:
    """At most `count` of the indices, evenly spread."""
    taken = min(count, len(indices))
    return [indices[number * len(indices) // taken] for number in range(taken)]


def centre(index: int, grid: Grid, corner: tuple[int, int], side: int) -> tuple[float, float]:
    """(x, y) in px of a token's centre in a square tile of `side` px."""
    x, y = token_position(index, grid, (TILE, TILE), (0, 0))
    return corner[0] + x * side / TILE, corner[1] + y * side / TILE
