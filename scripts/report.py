"""Write one self-contained HTML page about rendered cases and a training run.

    python scripts/report.py --examples outputs/examples --run outputs/pocket --output report.html

Pictures are embedded; the page needs no other file and no network.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mosaic.files import in_one_line, require_file, write_text
from mosaic.reports.html import page

CURVES = (("loss/flow_matching", "flow matching"), ("loss/correspondence", "SCAL"), ("loss/disentanglement", "MDL"))

Figure = tuple[bytes, str]  # a PNG and its caption


def read_metrics(run: Path) -> list[dict]:
    """Lines of a run's metrics.jsonl, without the numbers that are null."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"--run {run}: metrics.jsonl is missing; give the output_dir of a training run.")
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{file}: must hold one JSON object per line ({error}).") from error
    if not lines:
        raise ValueError(f"{file}: is empty; the run has logged nothing yet.")
    return [{name: value for name, value in line.items() if value is not None} for line in lines]


def curve(points: Sequence[tuple[float, float]], title: str) -> str:
    """One loss curve as SVG: the logged values, and their running mean in bold."""
    from mosaic.reports.charts import Point, Series, line_chart  # and with it torch

    ys, ends = [y for _, y in points], sorted({points[0][0], points[-1][0]})
    mean, means = ys[0], []
    for x, y in points:
        mean = 0.85 * mean + 0.15 * y
        means.append(Point(x, mean))
    series = [Series("", [Point(x, y) for x, y in points], "#9bb8d8", width=1), Series("", means, "#1d4e89", width=2.5)]
    return line_chart(series, f"{title}: {min(ys):.2f} to {max(ys):.2f}", "step", "", x_ticks=ends, alt=title)


def example_figures(folder: Path) -> tuple[list[Figure], list[Figure]]:
    """Panels and attention maps of rendered cases."""
    panels = sorted(folder.glob("case_*_panel.png"))
    if not panels:
        raise FileNotFoundError(f"--examples {folder}: no case_*_panel.png there; run inference.py with --output-dir {folder} first.")
    maps = sorted(folder.glob("case_*_attention.png"))
    return [figure(path, path.stem.removesuffix("_panel")) for path in panels], [figure(path, path.stem) for path in maps]


def figure(path: Path, caption: str) -> Figure:
    """A PNG file, and its caption without underscores."""
    return path.read_bytes(), caption.replace("_", " ")


def run_findings(run: Path) -> dict[str, Any]:
    """Loss curves, attention accuracy, and held-out panels before and after; those are None where validation came no more than once."""
    metrics, charts = read_metrics(run), []
    for key, title in CURVES:
        points = [(entry["step"], entry[key]) for entry in metrics if math.isfinite(entry.get(key, math.nan))]
        if points:
            charts.append(curve(points, title))
    accuracies = [entry for entry in metrics if math.isfinite(entry.get("attention/exact", math.nan))]
    steps = sorted((run / "validation").glob("step_*"))
    return {"charts": charts, "accuracies": accuracies, "pairs": held_out_pairs(steps[0], steps[-1]) if len(steps) > 1 else None}


def held_out_pairs(first: Path, last: Path) -> list[list[Figure]]:
    """The panels that two folders of validation share."""
    names = [path.name for path in sorted(first.glob("case_*.png")) if (last / path.name).is_file()]
    return [[((step / name).read_bytes(), f"{Path(name).stem}, step {int(step.name[5:])}") for step in (first, last)] for name in names]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=Path, help="output folder of inference.py")
    parser.add_argument("--run", type=Path, help="output folder of a training run")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    try:
        require_file(arguments.output, "--output")
        if not (arguments.examples or arguments.run):
            raise ValueError("give --examples, --run, or both.")
        panels, maps = example_figures(arguments.examples) if arguments.examples else ([], [])
        run = run_findings(arguments.run) if arguments.run else None
        write_text(arguments.output, page("report.html.jinja", title="MOSAIC report", panels=panels, maps=maps, run=run))
    except (ValueError, OSError) as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        return 2
    print(f"report: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
