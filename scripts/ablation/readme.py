"""The part of a page that a trial fills: its main tables and figures, between two markers."""

import os
from pathlib import Path
from typing import Any

from mosaic.files import write_text
from scripts.ablation.arms import PARTS
from scripts.ablation.tables import by_arm, cells_of, contrast_table, intervention_table, summary_table

MARKER = "<!-- trial -->"
FIGURES = (
    ("scratch_apart.svg", "apart over steps"),
    ("scratch_hide_target.svg", "what hiding the target from references costs, over steps"),
)
SUMMARY_CELLS = ("twins_k2", "distinct_k2")


def block(results: dict[str, Any], folder: str) -> str:
    """The tables and figures as Markdown.

    Args:
        results: Of the trial.
        folder: Of the report, relative to the page.
    """
    hardware, seconds = results["hardware"], results["seconds"]
    hours = {name: f"{value / 3600:.1f} h" for name, value in seconds.items()}
    made = (
        f"{results['date'][:10]}, in brackets 95 % intervals for other seeds and scenes (Frechet distance: for other seeds); "
        f"{hardware['processor']}, {hardware['cores']} cores, {hardware['side_by_side']} runs side by side: training {hours['training']}, "
        f"measuring {hours['measuring']}, added up over all runs. All tables, and every number's run: [report.md]({folder}/report.md)."
    )
    parts = [made]
    for part in PARTS:
        arms = by_arm(results, part)
        if arms:
            cells = [cell for cell in SUMMARY_CELLS if cell in cells_of(arms)]
            parts += [contrast_table(results, part), *(summary_table(results, part, cell) for cell in cells)]
            parts += [intervention_table(results, part, cell) for cell in cells[:1]]
    parts += [f"![{text}]({folder}/{name})" for name, text in FIGURES if by_arm(results, "scratch")]
    return "\n\n".join(parts)


def put_into(page: Path, results: dict[str, Any], report: Path) -> None:
    """Write the tables and figures of a report into a page.

    Raises:
        FileNotFoundError: There is no such page.
        ValueError: It has not exactly two markers, or the trial is not finished.
    """
    if not results["complete"]:
        raise ValueError(f"{page}: only a finished trial goes into a page; start the same scripts/ablation.py again to finish it.")
    put_between(page, MARKER, block(results, Path(os.path.relpath(report.parent, page.parent)).as_posix()))


def put_between(page: Path, marker: str, text: str) -> None:
    """Write a text between the two lines of a page that are a marker.

    Raises:
        FileNotFoundError: There is no such page.
        ValueError: It has not exactly two such lines.
    """
    parts = page.read_text(encoding="utf-8").split(f"{marker}\n")
    if len(parts) != 3:
        raise ValueError(f'{page}: must have two lines "{marker}", between which the tables go, got {len(parts) - 1}.')
    write_text(page, f"{parts[0]}{marker}\n{text}\n\n{marker}\n{parts[2]}")
