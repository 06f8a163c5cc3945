"""The doctor's page: the verdict, the findings as a table, and a contact sheet of samples with lines between corresponding cells."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mosaic.data import Inspection
from mosaic.data.placement import reference_sides, target_sides
from mosaic.data.quality import FEWEST_POINTS
from mosaic.files import write_text
from mosaic.reports.html import page
from preprocess.matching.sheets import correspondence_panel
from scripts.doctor.wording import LOOK, rows

FOLDER = Path(__file__).resolve().parent
PICTURES = 12  # samples on the sheet


class Shown(NamedTuple):
    """A sample of the sheet.

    Attributes:
        badness: By how much it wants to be looked at, in [0, 1]: for points beside a subject, without order, or of unknown order.
        coherence: Of its least coherent reference; None where none has points enough to tell.
        found: The sample.
    """

    badness: float
    coherence: float | None
    found: Inspection


@dataclass
class Sheet:
    """The samples that want to be looked at most, of those seen so far, worst first; equal ones in their order."""

    worst: list[Shown] = field(default_factory=list)

    def add(self, found: Inspection, coherence: float | None) -> None:
        """Keep a sample, if it is among the worst."""
        outside = max((side.outside for side in (*target_sides(found), *reference_sides(found))), default=0.0)
        shown = Shown(max(outside, 1 - (coherence or 0.0)), coherence, found)
        self.worst = sorted([*self.worst, shown], key=lambda one: -one.badness)[:PICTURES]

    def panels(self) -> list[tuple[bytes, str]]:
        """Per sample a PNG, each reference beside the target, and its caption."""
        return [(_panel(shown.found), f"{shown.found.id}: {_words(shown.coherence)}; {shown.found.prompt}") for shown in self.worst]


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


def _words(coherence: float | None) -> str:
    return f"no reference has {FEWEST_POINTS} points" if coherence is None else f"coherence {coherence:.2f}"


def _panel(found: Inspection) -> bytes:
    file = io.BytesIO()
    panel = correspondence_panel(found.target, found.references, found.points, found.target_grid, found.reference_grids)
    panel.save(file, format="PNG")
    return file.getvalue()
