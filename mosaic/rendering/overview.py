"""The page that links the pages of all pictures of a folder (`--report`)."""

import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mosaic.files import relative_path, write_text
from mosaic.images import load_image
from mosaic.rendering.case_page import case_title, strongest_leak
from mosaic.rendering.folder import OVERVIEW, PAGE, PANEL
from mosaic.rendering.notes import read_manifest
from mosaic.rendering.recipe import has_digest
from mosaic.reports.figures import MARGIN, TILE
from mosaic.reports.html import is_page, page


def write_overview(folder: Path) -> None:
    """Write the page that links the pages of all pictures that the manifest of a folder names; remove ours where there are none.

    Raises:
        OSError: It cannot be written.
    """
    rows = [row for row in read_manifest(folder) if _is_reported(row, folder)]
    if not rows:
        if is_page(folder / OVERVIEW):
            (folder / OVERVIEW).unlink()
        return
    entries = [_entry(row, folder) for row in rows]
    write_text(folder / OVERVIEW, page("overview.html.jinja", title="MOSAIC: where the references look", entries=entries))


def _is_reported(row: Mapping[str, Any], folder: Path) -> bool:
    """Whether a line of the manifest has numbers of the known form, and whole files in the folder itself; lines come from a file."""
    try:
        leakage, owned = row["attention"]["leakage"], row["attention"]["owned"]
        square = len(leakage) == len(owned) > 0 and all(len(line) == len(owned) for line in leakage)
        fine = square and all(isinstance(share, (int, float)) for line in [*leakage, owned] for share in line)
        path = folder / relative_path(f"{row['name']}{PAGE}", "name", "its folder")
        fine = fine and isinstance(row["prompt"], str)
        return fine and path.is_file() and has_digest(_panel(row, folder), row["digest"])
    except (KeyError, TypeError, OSError, ValueError):
        return False


def _panel(row: Mapping[str, Any], folder: Path) -> Path:
    return folder / f"{row['name']}{PANEL}"


def _entry(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the card that links a page shows."""
    numbers, name, panel = row["attention"], row["name"], load_image(_panel(row, folder))
    leakage, count = numbers["leakage"], len(numbers["owned"])
    own = sum(line[k] for k, line in enumerate(leakage)) / count
    leak = strongest_leak(numbers)
    return {
        "link": urllib.parse.quote(name + PAGE),
        "heading": case_title(name),
        "prompt": row["prompt"],
        "thumbnail": panel.crop((0, MARGIN // 2, panel.width, min(panel.height, TILE + MARGIN))).convert("RGB"),
        "count": count,
        "own": own,
        "others": sum(map(sum, leakage)) / count - own,
        "leak": leak,
        "leaked": leak and leakage[leak[0]][leak[1]],
    }
