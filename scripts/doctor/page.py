"""The doctor's page: findings as a table, and a contact sheet of samples with lines between corresponding cells."""

import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mosaic.data import Inspection
from mosaic.files import write_text
from mosaic.reports.figures import contact_sheet
from mosaic.reports.html import embedded, page
from preprocess.matching.sheets import correspondence_panel

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
    cells = "".join(
        f'<tr><td style="text-align:left">{html.escape(name)}</td><td>{html.escape(text)}</td></tr>' for name, text in _flat(summary)
    )
    parts = [f"<p><b>{html.escape(verdict)}</b></p>", f"<table>{cells}</table>"]
    if shown:
        parts.append(embedded(_sheet(shown), "samples: each reference, the target, and lines between corresponding cells"))
    write_text(path, page(title, [f"<h1>{html.escape(title)}</h1>", *parts]))


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
