"""The pocket bench's page: arms and numbers of subjects, what is between them, and some cases to look at."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from mosaic.files import without_nan, write_text
from mosaic.images import load_image
from mosaic.reports.html import page
from scripts.bench import pocket_data as data
from scripts.bench import pocket_numbers as numbers

TEMPLATES = Path(__file__).resolve().parent
NUMBERS, PAGE, TABLE = "pocket.json", "index.html", "table"
THUMBNAIL = 96  # px
SHOWN = 2  # cases of each number of subjects


def write_page(folder: data.Folder) -> None:
    """Write pocket.json and index.html."""
    found = numbers.summary(numbers.read_values(folder))
    write_text(folder.output / NUMBERS, json.dumps(without_nan(found), indent=1) + "\n")
    values = {
        "metrics": numbers.METRICS,
        "arms": numbers.ARMS,
        "found": found,
        "steps": folder.size.steps,
        "cases": sum(len(items) for items in folder.lists.values()),
        "examples": examples(folder),
        "table": f"{TABLE}/table.html",
    }
    write_text(folder.output / PAGE, page("pocket.html.jinja", TEMPLATES, title="The pocket bench", **values))


def examples(folder: data.Folder) -> list[dict[str, Any]]:
    """The first cases of each number of subjects: references, and the picture of each arm."""
    found = []
    for name, items in folder.lists.items():
        pictures = {arm: folder.pictures(arm, name) for arm in numbers.ARMS}
        for k in sorted({len(item.subjects) for item in items}):
            of_number = [number for number, item in enumerate(items) if len(item.subjects) == k]
            for number in of_number[:: max(1, len(of_number) // SHOWN)][:SHOWN]:
                found.append(
                    {
                        "prompt": items[number].prompt,
                        "references": [thumbnail(folder.subjects / subject / "00.png") for subject in items[number].subjects],
                        "pictures": {arm: thumbnail(files[number]) for arm, files in pictures.items()},
                    }
                )
    return found


def thumbnail(path: Path) -> Image.Image:
    """A picture at the page's size."""
    return load_image(path).convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
