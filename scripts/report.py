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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mosaic.files import require_file, write_text
from mosaic.reports.html import embedded, page

CURVES = (("loss/flow_matching", "flow matching"), ("loss/correspondence", "SCAL"), ("loss/disentanglement", "MDL"))
WIDTH, HEIGHT, PAD = 340, 200, 42


def figure(path: Path, caption: str) -> str:
    """A PNG file inside the page, with its caption."""
    return embedded(path.read_bytes(), caption)


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
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    span_x, span_y = max(xs[-1] - xs[0], 1), max(high - low, 1e-9)

    def place(x: float, y: float) -> str:
        left = PAD + (x - xs[0]) / span_x * (WIDTH - PAD - 10)
        return f"{left:.1f},{HEIGHT - 28 - (y - low) / span_y * (HEIGHT - 56):.1f}"

    smooth, mean = [], ys[0]
    for x, y in points:
        mean = 0.85 * mean + 0.15 * y
        smooth.append(place(x, mean))
    thin = " ".join(place(x, y) for x, y in points)
    return (
        f'<svg class="plot" width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{title}">'
        f'<text x="{PAD}" y="18" font-size="14" font-weight="600">{title}</text>'
        f'<polyline points="{thin}" fill="none" stroke="#9bb8d8" stroke-width="1"/>'
        f'<polyline points="{" ".join(smooth)}" fill="none" stroke="#1d4e89" stroke-width="2.5"/>'
        f'<text x="4" y="36" font-size="11">{high:.2f}</text><text x="4" y="{HEIGHT - 28}" font-size="11">{low:.2f}</text>'
        f'<text x="{PAD}" y="{HEIGHT - 8}" font-size="11">step {xs[0]:g}</text>'
        f'<text x="{WIDTH - 10}" y="{HEIGHT - 8}" font-size="11" text-anchor="end">step {xs[-1]:g}</text></svg>'
    )


def examples_section(folder: Path) -> list[str]:
    """Panels and attention maps of rendered cases."""
    panels = sorted(folder.glob("case_*_panel.png"))
    if not panels:
        raise FileNotFoundError(f"--examples {folder}: no case_*_panel.png there; run inference.py with --output-dir {folder} first.")
    parts = ["<h2>Example cases</h2><p>References at the left, the generated picture at the right.</p><div class=row>"]
    parts += [figure(path, path.stem.removesuffix("_panel").replace("_", " ")) for path in panels]
    parts.append("</div>")
    maps = sorted(folder.glob("case_*_attention.png"))
    if maps:
        parts.append(
            "<h2>Where the references look</h2><p>Per reference: lines from its points to the peak of their attention in the "
            "picture (mean over heads, blocks and steps), and the mean attention of the whole subject in red.</p><div class=row>"
        )
        parts += [figure(path, path.stem.replace("_", " ")) for path in maps]
        parts.append("</div>")
    return parts


def run_section(run: Path) -> list[str]:
    """Loss curves, attention accuracy, and held-out panels before and after."""
    metrics = read_metrics(run)
    parts = ["<h2>Training</h2><p>Thin: logged values; bold: their running mean.</p><div class=row>"]
    for key, title in CURVES:
        points = [(entry["step"], entry[key]) for entry in metrics if math.isfinite(entry.get(key, math.nan))]
        if points:
            parts.append(curve(points, title))
    parts.append("</div>")
    accuracies = [entry for entry in metrics if math.isfinite(entry.get("attention/exact", math.nan))]
    if accuracies:
        parts.append("<h2>Attention accuracy on held-out samples</h2><table><tr><th>step</th><th>exact</th><th>chance</th>")
        parts.append("<th>within one token</th><th>chance</th></tr>")
        for entry in accuracies:
            values = [entry[f"attention/{name}"] for name in ("exact", "exact_chance", "near", "near_chance")]
            parts.append(f"<tr><td>{entry['step']}</td>" + "".join(f"<td>{100 * value:.1f} %</td>" for value in values) + "</tr>")
        parts.append("</table>")
    steps = sorted((run / "validation").glob("step_*"))
    if len(steps) > 1:
        parts.append("<h2>Held-out cases, before and after</h2>")
        for before in sorted(steps[0].glob("case_*.png")):
            after = steps[-1] / before.name
            if after.is_file():
                parts.append('<div class="row">' + figure(before, f"{before.stem}, step {int(steps[0].name[5:])}"))
                parts.append(figure(after, f"{after.stem}, step {int(steps[-1].name[5:])}") + "</div>")
    return parts


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
        parts = examples_section(arguments.examples) if arguments.examples else []
        parts += run_section(arguments.run) if arguments.run else []
        write_text(arguments.output, page("MOSAIC report", ["<h1>MOSAIC report</h1>", *parts]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
