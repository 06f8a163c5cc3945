"""The doctor's page: the verdict, the findings as a table, and a contact sheet of samples with lines between corresponding cells."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mosaic.data import Inspection
from mosaic.files import write_text
from mosaic.reports.html import page
from preprocess.matching.sheets import correspondence_panel
from scripts.doctor.matches import badness
from scripts.doctor.wording import LOOK, rows

FOLDER = Path(__file__).resolve().parent
PICTURES = 12  # samples on the sheet


@dataclass
class Sheet:
    """The samples that want to be looked at most, of those seen so far, worst first; equal ones in their order."""

    worst: list[tuple[float, Inspection]] = field(default_factory=list)

    def add(self, found: Inspection) -> None:
        """Keep a sample, if it is among the worst."""
        self.worst = sorted([*self.worst, (badness(found), found)], key=lambda one: -one[0])[:PICTURES]

    def panels(self) -> list[tuple[bytes, str]]:
        """Per sample a PNG, each reference beside the target, and its caption."""
        return [(_panel(found), f"{found.id}: {_coherence(found, bad)}; {found.prompt}") for bad, found in self.worst]


def write_findings(summary: dict[str, Any], sheet: Sheet, path: Path, title: str) -> None:
    """Write the page.

    Args:
        summary: Of `scripts.doctor.findings.summarise`, with what the data set says of itself.
        sheet: Samples for the contact sheet.
        path: The page.
        title: What was looked at.
    """
    verdict = f"{summary['verdict'].capitalize()}."
    because = [*summary["reasons"], *summary["doubts"]]
    values = {"rows": list(rows(summary)), "because": because, "panels": sheet.panels(), "look": LOOK}
    write_text(path, page("findings.html.jinja", FOLDER, title=title, verdict=verdict, **values))


def _coherence(found: Inspection, bad: float) -> str:
    return "no points" if not any(map(len, found.points)) else f"coherence {1 - bad:.2f}" if bad < 1 else "coherence 0 or not told"


def _panel(found: Inspection) -> bytes:
    file = io.BytesIO()
    panel = correspondence_panel(found.target, found.references, found.points, found.target_grid, found.reference_grids)
    panel.save(file, format="PNG")
    return file.getvalue()
