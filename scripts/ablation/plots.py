"""The figures of a trial, from its results file alone: learning curves, and measures over the steps of training."""

from typing import Any

from mosaic.reports.charts import Point, Row, Series, line_chart, row_chart
from scripts.ablation.tables import (
    APART,
    CHANGES,
    IDENTIFICATION,
    Measure,
    Runs,
    by_arm,
    cell_title,
    steps_of,
    value_of,
)

CURVES = {
    "loss/flow_matching": "flow matching loss",
    "loss/correspondence": "SCAL, nats",
    "loss/disentanglement": "MDL, nats",
}
OTHER_DEFINITIONS = ("release",)  # arms whose losses are of other blocks, and defined otherwise
#: Measures over the steps of training: name of the figure, measure, cell.
WATCHED: tuple[tuple[str, Measure, str], ...] = (
    ("apart", APART, "twins_k2"),
    ("identification", IDENTIFICATION, "distinct_k2"),
    *((name, CHANGES[name], "distinct_k2") for name in ("hide_references", "hide_target", "own_reference")),
)


def charts(results: dict[str, Any], part: str) -> dict[str, str]:
    """SVG text by file name: of a part's arms."""
    arms, found = by_arm(results, part), {}
    steps = steps_of([runs for runs in arms.values() if runs[0]["steps"]])
    for name, measure, cell in WATCHED if len(steps) > 1 else ():
        points = {arm: [Point(step, *value_of(measure, runs, cell, step)) for step in steps] for arm, runs in arms.items()}
        series = [Series(runs[0]["meaning"], points[arm]) for arm, runs in arms.items()]
        found[f"{part}_{name}.svg"] = line_chart(series, f"{measure.title}, {cell_title(cell)}", "step", "")
    for name, label in CURVES.items():
        hidden = () if name == "loss/flow_matching" else OTHER_DEFINITIONS
        series = [Series(runs[0]["meaning"], [] if arm in hidden else mean_curve(runs, name)) for arm, runs in arms.items()]
        found[f"{part}_learning_{name.partition('/')[2]}.svg"] = line_chart(series, f"{label} during training", "step", "")
    if len(steps) == 1:
        values = [(runs[0]["meaning"], value_of(APART, runs, "twins_k2")) for runs in arms.values()]
        rows = [Row(name, name, Point(value.mean, 0.0, value.low, value.high)) for name, value in values]
        found[f"{part}_apart.svg"] = row_chart(rows, f"{APART.title}, {cell_title('twins_k2')}", APART.title)
    return found


def mean_curve(runs: Runs, name: str) -> list[Point]:
    """Mean over the seeds that have a value at a step."""
    values: dict[float, list[float]] = {}
    for run in runs:
        for step, value in run["curves"].get(name, []):
            values.setdefault(step, []).append(value)
    return [Point(step, sum(found) / len(found)) for step, found in sorted(values.items())]
