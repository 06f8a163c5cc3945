"""What `bench.py table` does: a Markdown file and a page with the pictures at both ends of each metric."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mosaic.evaluation.entries import tile_of
from mosaic.evaluation.tables import NAMES, make_tables, read_scores, to_markdown
from mosaic.files import require_folder, write_text
from mosaic.images import load_image, to_rgb
from mosaic.reports.html import page

THUMBNAIL = 128  # px


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line says. Raises FileNotFoundError or ValueError where scores or flags will not do."""
    require_folder(arguments.output, "--output")
    scored, folders = [], []
    for given in arguments.scores:
        method, equals, path = given.rpartition("=")
        folder = Path(path)
        scored.append((method if equals else folder.resolve().name, read_scores(folder)))
        folders.append(folder if folder.is_dir() else folder.parent)
    names = [(method, scores["benchmark"]) for method, scores in scored]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled:
        raise ValueError(f"two scores of {doubled[1]} would both be {doubled[0]}. Name them: NAME=FOLDER.")
    tables = make_tables(scored, with_published=not arguments.ours_alone)
    markdown = "\n".join(f"### {table.about}\n\n{to_markdown(table)}" for table in tables)
    sections = [_section(method, scores, folder) for (method, scores), folder in zip(scored, folders, strict=True)]
    notes = [list(dict.fromkeys(row.protocol for row in table.rows)) for table in tables]
    html = page(
        "table.html.jinja",
        Path(__file__).parent,
        title="Benchmarks",
        tables=list(zip(tables, notes, strict=True)),
        names=NAMES,
        sections=sections,
    )
    write_text(arguments.output / "table.md", markdown)
    write_text(arguments.output / "table.html", html)
    print(markdown)
    print(arguments.output / "table.html")


def _section(method: str, scores: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the page shows of one scoring."""
    ends = [
        (NAMES.get(metric, metric), [("Lowest", _thumbnails(both["worst"], folder)), ("Highest", _thumbnails(both["best"], folder))])
        for metric, both in scores["extremes"].items()
    ]
    return {"title": f"{method}, {scores['benchmark']}", "ends": ends, "left_out": scores["left_out"]}


def _thumbnails(shown: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Pictures with their references; those that are no longer there are said to be missing."""
    found = []
    for one in shown:
        pictures = [(_thumbnail(folder / one["picture"], one["tile"]), "generated")]
        pictures += [(_thumbnail(folder / path, None), "reference") for path in one["references"]]
        found.append({"pictures": pictures, "caption": f"{one['value']:.1f}: {one['prompt']} (run {one['run']})"})
    return found


def _thumbnail(path: Path, tile: int | None) -> Image.Image | None:
    try:
        picture = tile_of(to_rgb(load_image(path)), tile)
    except (ValueError, OSError):
        return None
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture
