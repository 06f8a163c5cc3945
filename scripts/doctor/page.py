"""The doctor's page: findings as a table, and a contact sheet of samples with lines between corresponding cells."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mosaic.data import Inspection
from mosaic.files import write_text
from mosaic.reports.figures import contact_sheet
from mosaic.reports.html import page
from preprocess.matching.sheets import correspondence_panel

FOLDER = Path(__file__).resolve().parent
PICTURES = 12  # samples on the sheet


def write_findings(summary: dict[str, Any], shown: Sequence[Inspection], path: Path, title: str) -> None:
    """Write the page.

    Args:
        summary: Of `scripts.doctor.findings.summarise`.
        shown: Samples for the contact sheet.
        path: The page.
        title: What was looked at.
    """
    verdict = "Fit for training." if summary["healthy"] else f"Not fit for training: {'; '.join(summary['reasons'])}."
    sheet = _sheet(shown) if shown else None
    rows = list(_flat(summary))
    write_text(path, page("findings.html.jinja", FOLDER, title=title, verdict=verdict, rows=rows, sheet=sheet))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested findings as dotted names and texts."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, float):
        yield name, f"{value:.4g}"
    else:
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _sheet(shown: Sequence[Inspection]) -> bytes:
    """A PNG of all the samples shown."""
    panels = [
        correspondence_panel(found.target, found.references, found.points, found.target_grid, found.reference_grids) for found in shown
    ]
    file = io.BytesIO()
    contact_sheet(panels, columns=3).save(file, format="PNG")
    return file.getvalue()
