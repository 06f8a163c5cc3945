"""What a run leaves beside its pictures: journals while it runs; the manifest and the contact sheets at its end."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mosaic.files import json_line, relative_path, write_text
from mosaic.images import load_image
from mosaic.rendering.checks import MANIFEST
from mosaic.rendering.recipe import has_digest, read_recipe
from mosaic.rendering.recipes import PictureJob, job_files
from mosaic.reports.figures import contact_sheet, save_picture

JOURNALS = ".journal_*.jsonl"
PANELS_PER_SHEET = 60


class Journal:
    """A process's notes on its pictures, a line each, kept until the manifest is written."""

    def __init__(self, folder: Path, process_index: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / JOURNALS.replace("*", str(process_index))

    def add(self, job: PictureJob, **values: Any) -> None:
        """Add a line. A line break comes first: the last line of a killed process may be half a line."""
        line = json_line({"name": job.name, "digest": job.recipe.digest, **values})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")


def read_notes(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """By name and digest, the last that manifest and journals of a folder say of a picture.

    Which of two journals is the later one cannot be known, for a picture may go to another process when its run is started again. So
    that a picture was made counts more than that it once could not be.
    """
    journals = [note for path in sorted(folder.glob(JOURNALS)) for note in _read_lines(path)]
    journals.sort(key=lambda note: "error" not in note)
    return {(note["name"], note["digest"]): note for note in [*_read_lines(folder / MANIFEST), *journals]}


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder's manifest; none where there is no manifest."""
    return _read_lines(folder / MANIFEST)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that are whole and name a picture and its digest."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    notes = []
    for line in text.split("\n"):
        try:
            note = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(note, dict) and isinstance(note.get("name"), str) and isinstance(note.get("digest"), str):
            notes.append(note)
    return notes


def write_manifest(jobs: Sequence[PictureJob], folder: Path) -> list[str]:
    """Write a line for every finished picture, in the order of the jobs, and remove the journals.

    A line is the recipe that the picture carries, its file, the seconds it took (null where they were lost), and with a report its numbers,
    "attention". Lines of an earlier manifest on pictures of other cases that are still there come last.

    Returns:
        What went wrong, for every job whose picture is missing.
    """
    notes, rows, failures = read_notes(folder), [], []
    for job in jobs:
        note, recipe = notes.get((job.name, job.recipe.digest), {}), _recipe_at(folder, job.name)
        if recipe.get("digest") != job.recipe.digest:
            failures.append(f"{job.case.place} ({job.name}): {note.get('error') or 'its process ended before the picture was made.'}")
        else:
            attention = {"attention": note["attention"]} if "attention" in note else {}
            rows.append({**recipe, "file": f"{job.name}.png", "seconds": note.get("seconds"), **attention})
    names = {job.name for job in jobs}
    rows += [note for (name, digest), note in notes.items() if name not in names and _recipe_at(folder, name).get("digest") == digest]
    if folder.is_dir():
        write_text(folder / MANIFEST, "".join(json_line(row) + "\n" for row in rows))
    for path in folder.glob(JOURNALS):
        path.unlink()
    return failures


def write_sheets(jobs: Sequence[PictureJob], folder: Path) -> None:
    """Write the panels of all finished pictures as overview.png, or as overview_1.png, overview_2.png, ... where one does not hold them.

    Panels that are damaged, or of an earlier recipe, are left out.
    """
    panels = [(job_files(job, folder).panel, job.recipe.digest) for job in jobs]
    paths = [path for path, digest in panels if has_digest(path, digest)]
    pages = [paths[start : start + PANELS_PER_SHEET] for start in range(0, len(paths), PANELS_PER_SHEET)]
    names = ["overview.png"] if len(pages) == 1 else [f"overview_{number}.png" for number in range(1, len(pages) + 1)]
    for name, page in zip(names, pages, strict=True):
        save_picture(contact_sheet([load_image(path) for path in page]), folder / name)
    for path in folder.glob("overview*.png"):
        if path.name not in names and re.fullmatch(r"overview(_\d+)?\.png", path.name):
            path.unlink()


def _recipe_at(folder: Path, name: str) -> dict[str, Any]:
    """The recipe of the picture of that name; empty where there is none. Names come from files, and may not lead out of the folder."""
    try:
        return read_recipe(folder / relative_path(f"{name}.png", MANIFEST, "its folder")) or {}
    except ValueError:
        return {}
