"""Write one self-contained HTML page about rendered cases and a training run.

    python scripts/report.py --examples outputs/examples --run outputs/pocket --output report.html

Pictures are embedded; the page needs no other file and no network. Of cases of the pocket world the identity judge says which subjects
are missing, and which are recognised as their references; cases that were rendered with --report are linked to their pages.
"""

import argparse
import json
import math
import os
import sys
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mosaic.commands import NOTHING, command
from mosaic.files import in_one_line, require_file, write_text
from mosaic.reports.html import page

if TYPE_CHECKING:
    from scripts.pocket.verdicts import SubjectVerdict

TITLES = {"loss/flow_matching": "flow matching", "loss/correspondence": "SCAL", "loss/disentanglement": "MDL"}
LEARNT = 2.0  # times chance from which attention is said to find the points

Figure = tuple[bytes, str]  # a PNG and its caption


class ExampleCase(NamedTuple):
    """A rendered case on the page.

    Attributes:
        heading: Its name.
        panel: A PNG: references and picture.
        link: Address of its own page from this one; "": it has none.
        verdicts: What the judge says of its subjects; empty where nobody knows.
    """

    heading: str
    panel: bytes
    link: str
    verdicts: "list[SubjectVerdict]"


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


def example_cases(folder: Path, output: Path) -> tuple[list[ExampleCase], list[Figure]]:
    """The rendered cases of a folder, and their attention maps.

    Raises:
        FileNotFoundError: There are none.
    """
    panels = sorted(folder.glob("case_*_panel.png"))
    if not panels:
        raise FileNotFoundError(f"--examples {folder}: no case_*_panel.png there; run inference.py with --output-dir {folder} first.")
    verdicts, cases = verdicts_of(folder), []
    for panel in panels:
        name = panel.stem.removesuffix("_panel")
        page_file = folder / f"{name}_report.html"
        link = Path(os.path.relpath(page_file, output.parent)).as_posix() if page_file.is_file() else ""
        cases.append(ExampleCase(name.replace("_", " "), panel.read_bytes(), urllib.parse.quote(link), verdicts.get(name, [])))
    return cases, [figure(path, path.stem) for path in sorted(folder.glob("case_*_attention.png"))]


def verdicts_of(folder: Path) -> "dict[str, list[SubjectVerdict]]":
    """By name of the picture what the judge says of cases of the pocket world; empty where there are none, or no judge."""
    from mosaic.rendering.notes import read_manifest
    from scripts.pocket.judge import load_judge
    from scripts.pocket.verdicts import identity_of, judge_rows

    rows = [row for row in read_manifest(folder) if isinstance(row.get("references"), list)]
    if not any(isinstance(entry, dict) and identity_of(str(entry.get("file"))) for row in rows for entry in row["references"]):
        return {}
    try:
        return judge_rows(load_judge(), folder, rows)
    except (FileNotFoundError, ValueError) as error:
        print(f"note: no verdicts on the examples: {in_one_line(error)}", file=sys.stderr)
        return {}


def examples_verdict(cases: "Sequence[ExampleCase]") -> str:
    """One sentence on all subjects that were judged; "" where none was."""
    found = [verdict.verdict for case in cases for verdict in case.verdicts]
    if not found:
        return ""
    missing, right = found.count("missing"), found.count("as its reference")
    return (
        f"The judge looked for {len(found)} subjects: {missing} {'is' if missing == 1 else 'are'} missing, {right} "
        f"{'is' if right == 1 else 'are'} recognised as their references, {len(found) - missing - right} are there with other looks."
    )


def training_verdict(accuracies: Sequence[Mapping[str, float]], steps: int) -> str:
    """One sentence on what training has reached, by attention accuracy on held-out samples; "" without two validations."""
    if len(accuracies) < 2:
        return ""
    first, last = accuracies[0]["attention/exact"], accuracies[-1]["attention/exact"]
    chance = accuracies[-1].get("attention/exact_chance", math.nan)
    words = f"{100 * first:.1f} % before and {100 * last:.1f} % after {steps} steps (chance {100 * chance:.1f} %)"
    if last >= LEARNT * chance and last > first:
        return f"Training works: attention peaks at the right token for {words}. The looks of the subjects come later than that."
    return f"Too short to judge: attention peaks at the right token for {words}. Train longer: STEPS=1000 bash scripts/quickstart.sh."


def figure(path: Path, caption: str) -> Figure:
    """A PNG file, and its caption without underscores."""
    return path.read_bytes(), caption.replace("_", " ")


def run_findings(run: Path) -> dict[str, Any]:
    """Loss curves, attention accuracy, and held-out panels before and after; those are None where validation came no more than once."""
    metrics, charts = read_metrics(run), []
    terms = dict.fromkeys(key for entry in metrics for key in entry if key.startswith("loss/") and key != "loss/total")
    for key in terms:
        title = TITLES.get(key, key.removeprefix("loss/").replace("_", " "))
        points = [(entry["step"], entry[key]) for entry in metrics if math.isfinite(entry.get(key, math.nan))]
        if points:
            charts.append(curve(points, title))
    accuracies = [entry for entry in metrics if math.isfinite(entry.get("attention/exact", math.nan))]
    steps = sorted((run / "validation").glob("step_*"))
    verdict = training_verdict(accuracies, metrics[-1].get("step", 0))
    pairs = held_out_pairs(steps[0], steps[-1]) if len(steps) > 1 else None
    return {"charts": charts, "accuracies": accuracies, "verdict": verdict, "pairs": pairs}


def held_out_pairs(first: Path, last: Path) -> list[list[Figure]]:
    """The panels that two folders of validation share."""
    names = [path.name for path in sorted(first.glob("case_*.png")) if (last / path.name).is_file()]
    return [[((step / name).read_bytes(), f"{Path(name).stem}, step {int(step.name[5:])}") for step in (first, last)] for name in names]


@command(NOTHING)
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=Path, help="output folder of inference.py")
    parser.add_argument("--run", type=Path, help="output folder of a training run")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    require_file(arguments.output, "--output")
    if not (arguments.examples or arguments.run):
        raise ValueError("give --examples, --run, or both.")
    cases, maps = example_cases(arguments.examples, arguments.output) if arguments.examples else ([], [])
    run = run_findings(arguments.run) if arguments.run else None
    values: dict[str, Any] = {"cases": cases, "verdict": examples_verdict(cases), "maps": maps, "run": run}
    write_text(arguments.output, page("report.html.jinja", title="MOSAIC report", **values))
    print(f"report: {arguments.output}")


if __name__ == "__main__":
    sys.exit(main())
