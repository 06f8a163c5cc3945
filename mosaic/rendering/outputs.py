"""What a run leaves beside its pictures: journals while it runs; the manifest and the contact sheets at its end."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mosaic.files import json_line, relative_path, write_text
from mosaic.images import load_image
from mosaic.pipeline.prompt_lengths import LostWords
from mosaic.rendering.folder import PANELS_PER_SHEET, SHEET_NAME, SHEET_TEXT, OwnFiles, picture_files, sheet_names
from mosaic.rendering.notes import MANIFEST, journal_path, journal_paths, read_failures, read_notes
from mosaic.rendering.recipe import has_digest, read_recipe
from mosaic.rendering.recipes import PictureJob
from mosaic.reports.figures import contact_sheet, save_picture

Failures = Mapping[tuple[str, str], str]  # by name and digest of a picture why it could not be made


class Journal:
    """A process's notes on its pictures, a line each, kept until the manifest is written.

    Attributes:
        path: The file.
        failures: What could not be made; kept here, too, since a disk that is full takes no note of it.
        closed: Whether the folder takes no more files: its disk is full, or cannot be written to any more.
    """

    def __init__(self, folder: Path, process_index: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = journal_path(folder, process_index)
        self.failures: dict[tuple[str, str], str] = {}
        self.closed = False

    def add(self, job: PictureJob, **values: Any) -> None:
        """Add a line. A line break comes first: the last line of a killed process may be half a line.

        Raises:
            OSError: It cannot be written.
        """
        line = json_line({"name": job.name, "digest": job.recipe.digest, **values})
        with open(self.path, "a", encoding="utf-8", opener=_not_through_a_link) as file:
            file.write(f"\n{line}\n")

    def add_failure(self, job: PictureJob, failure: str) -> None:
        """Note why a picture could not be made."""
        self.failures[job.name, job.recipe.digest] = failure
        with suppress(OSError):  # what is in memory is told at the end
            self.add(job, error=failure)


def _not_through_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def manifest_rows(
    jobs: Sequence[PictureJob], folder: Path, failures: Failures, lost: Mapping[str, LostWords]
) -> tuple[list[dict[str, Any]], list[str]]:
    """A line of the manifest for every finished picture, in the order of the jobs, and what went wrong with each that is missing.

    A line is the recipe that the picture carries, its file, the seconds it took (null where they were lost), with a report its numbers,
    "attention", and where the model did not read the whole prompt the end that it did not, "lost_words". Lines of an earlier manifest on
    pictures of other cases that are still there come last.

    Args:
        jobs: All pictures of the run.
        folder: Where they are.
        failures: What the processes of this run could not make; what the journals say of earlier ones comes after it.
        lost: By prompt, what of it was not read.
    """
    notes, causes, rows, problems = read_notes(folder), {**read_failures(folder), **failures}, [], []
    for job in jobs:
        key, recipe = (job.name, job.recipe.digest), _recipe_at(folder, job.name)
        if recipe.get("digest") != job.recipe.digest:
            problems.append(f"{job.case.place} ({job.name}): {causes.get(key, 'its process ended before the picture was made.')}")
        else:
            note = notes.get(key, {})
            attention = {"attention": note["attention"]} if "attention" in note else {}
            unread = {"lost_words": lost[job.recipe.prompt].words} if job.recipe.prompt in lost else {}
            rows.append({**recipe, "file": f"{job.name}.png", "seconds": note.get("seconds"), **unread, **attention})
    names = {job.name for job in jobs}
    rows += [note for (name, digest), note in notes.items() if name not in names and _recipe_at(folder, name).get("digest") == digest]
    return rows, problems


def write_manifest(rows: Iterable[Mapping[str, Any]], folder: Path) -> None:
    """Write the lines of `manifest_rows`, and remove the journals.

    Raises:
        OSError: It cannot be written; the journals stay, from which the next start writes it.
    """
    if folder.is_dir():
        write_text(folder / MANIFEST, "".join(json_line(row) + "\n" for row in rows))
    for path in journal_paths(folder):
        path.unlink()


def write_sheets(jobs: Sequence[PictureJob], folder: Path) -> None:
    """Write the panels of all finished pictures as overview.png, or as overview_1.png, overview_2.png, ... where one does not hold them.

    Panels that are damaged, or of an earlier recipe, are left out. Sheets of an earlier run that hold other panels go.

    Raises:
        OSError: One cannot be written.
        ValueError: One would take the place of a file that is not ours.
    """
    panels = [(picture_files(job.name, folder).panel, job.recipe.digest) for job in jobs]
    paths = [path for path, digest in panels if has_digest(path, digest)]
    names, own = sheet_names(len(paths)), OwnFiles(folder)
    for number, name in enumerate(names):
        page = paths[number * PANELS_PER_SHEET : (number + 1) * PANELS_PER_SHEET]
        if (folder / name).exists() and not own.is_sheet(folder / name):  # where some failed, a name was not looked at before
            raise ValueError(f"{folder / name} would be replaced, but it is no contact sheet of ours: move it away")
        save_picture(contact_sheet([load_image(path) for path in page]), folder / name, SHEET_TEXT)
    for path in folder.glob("overview*.png"):
        if path.name not in names and SHEET_NAME.fullmatch(path.name) and own.is_sheet(path):
            path.unlink()


def _recipe_at(folder: Path, name: str) -> dict[str, Any]:
    """The recipe of the picture of that name; empty where there is none. Names come from files, and may not lead out of the folder."""
    try:
        return read_recipe(folder / relative_path(f"{name}.png", MANIFEST, "its folder")) or {}
    except ValueError:
        return {}
