"""The page that links the pages of all pictures of a folder (`--report`)."""

import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mosaic.files import relative_path, write_text
from mosaic.images import load_image
from mosaic.rendering.outputs import read_manifest
from mosaic.rendering.recipe import has_digest
from mosaic.rendering.recipes import PAGE, PANEL
from mosaic.reports.case_figures import percent
from mosaic.reports.case_page import OVERVIEW, case_title, strongest_leak
from mosaic.reports.figures import MARGIN, TILE
from mosaic.reports.html import jpeg_uri, page, text
from mosaic.reports.page_style import STYLE


def write_overview(folder: Path) -> None:
    """Write the page that links the pages of all pictures that the manifest of a folder names; remove it where there are none."""
    rows = [row for row in read_manifest(folder) if _is_reported(row, folder)]
    if not rows:
        (folder / OVERVIEW).unlink(missing_ok=True)
        return
    count = f"{len(rows)} picture{'s' if len(rows) > 1 else ''} with an attention report."
    parts = [
        "<header><h1>Where the references look</h1>",
        f'<p class="soft">{count} Own place: the share of the references&rsquo; attention on the tokens '
        "where their own peaks are. Others&rsquo; places: the share on the tokens of another reference.</p></header>",
        f'<main><ul class="cases">{"".join(_entry(row, folder) for row in rows)}</ul></main>',
    ]
    write_text(folder / OVERVIEW, page("MOSAIC: where the references look", parts, STYLE))


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


def _entry(row: Mapping[str, Any], folder: Path) -> str:
    """A card that links a page."""
    numbers, name = row["attention"], row["name"]
    leakage, count = numbers["leakage"], len(numbers["owned"])
    own = sum(line[k] for k, line in enumerate(leakage)) / count
    others = sum(map(sum, leakage)) / count - own
    panel = load_image(_panel(row, folder))
    thumbnail = jpeg_uri(panel.crop((0, MARGIN // 2, panel.width, min(panel.height, TILE + MARGIN))).convert("RGB"))
    facts = f"own place {percent(own)}" + (f" · others&rsquo; places {percent(others)}" if count > 1 else "")
    pair = strongest_leak(numbers)
    leak = ""
    if pair is not None:
        i, j = pair
        leak = f"<p>Strongest leak: reference {i + 1} on the place of {j + 1}, {percent(leakage[i][j])}</p>"
    alt = f"{count} reference{'s' if count > 1 else ''} and the result for: {row['prompt']}"
    return (
        f'<li><a class="card" href="{text(urllib.parse.quote(name + PAGE))}"><img alt="{text(alt)}" src="{thumbnail}">'
        f'<h2>{text(case_title(name))}</h2><p><bdi>{text(row["prompt"])}</bdi></p><p class="soft">{facts}</p>{leak}</a></li>'
    )
