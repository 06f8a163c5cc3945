"""The files of an output folder: their names, and which of them a run has written. Only these may be replaced or removed.

A picture, a panel and a contact sheet carry a text of ours, a page begins as ours do; what was damaged since is known by the manifest,
which lists it. All else is the user's, whatever its name.
"""

import json
import re
import stat
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mosaic.rendering.cases.reading import Case
from mosaic.rendering.notes import JOURNAL, MANIFEST, read_manifest, read_notes
from mosaic.rendering.recipe import KEY
from mosaic.reports.html import is_page

PANEL, PAGE = "_panel.png", "_report.html"  # endings of the names of files
OVERVIEW = "report.html"
PANELS_PER_SHEET = 60
SHEET_NAME = re.compile(r"overview(_\d+)?\.png")
SHEET_TEXT = {KEY: json.dumps({"contact_sheet": True})}
_MARK = b"iTXt" + KEY.encode() + b"\0"  # where a PNG of ours begins to say how it was made
_HEAD = 4096  # bytes of a file in which that stands
_JOURNAL_HEAD = b'{"name"'


class PictureFiles(NamedTuple):
    """Files of one picture. The picture is written last, so that the files of one that is there are complete."""

    picture: Path
    panel: Path
    attention: Path
    page: Path


def picture_files(name: str, folder: Path) -> PictureFiles:
    """Where the files of a picture go; attention maps and page are there with a report only."""
    return PictureFiles(*(folder / f"{name}{ending}" for ending in (".png", PANEL, "_attention.png", PAGE)))


def picture_seeds(case: Case, seed: int) -> tuple[int, ...]:
    """Seeds of a case's pictures where `inference.seed` is `seed`."""
    options = case.options
    if options.seeds is not None:
        return options.seeds
    first = options.seed if options.seed is not None else seed + case.index
    return tuple(range(first, first + (options.num_images_per_prompt or 1)))


def picture_names(case: Case, seed: int) -> dict[str, int]:
    """Names of a case's pictures, with their seeds. A single one is named by the case's index alone, several also by their seeds."""
    seeds, name = picture_seeds(case, seed), f"case_{case.index:03d}"
    return {name: seeds[0]} if len(seeds) == 1 else {f"{name}_seed_{seed}": seed for seed in seeds}


def sheet_names(num_panels: int) -> list[str]:
    """Names of the contact sheets of so many panels: overview.png, or overview_1.png, overview_2.png, ... where one does not hold them."""
    count = -(-num_panels // PANELS_PER_SHEET)
    return ["overview.png"] if count == 1 else [f"overview_{number}.png" for number in range(1, count + 1)]


class OwnFiles:
    """Which files of a folder are of earlier runs, by the files themselves and by what manifest and journals list."""

    def __init__(self, folder: Path) -> None:
        """Read the manifest and the journals of a folder, which may not be there."""
        self._folder = folder
        notes = read_notes(folder)
        self._listed = {name for name, _ in notes}
        self._reported = {name for (name, _), note in notes.items() if "attention" in note}

    def is_picture(self, path: Path, name: str) -> bool:
        """Whether the picture, panel or map at a path was written for the picture of that name."""
        return is_marked(path) or (name in self._listed and _is_file(path) and not _opens(path))

    def is_page(self, path: Path, name: str) -> bool:
        """Whether the page at a path was written for the picture of that name."""
        return is_page(path) or (name in self._reported and _is_file(path))

    def is_overview(self, path: Path) -> bool:
        """Whether a path is the page that links the pages of the pictures."""
        return is_page(path) or (bool(self._reported) and _is_file(path))

    def is_sheet(self, path: Path) -> bool:
        """Whether a path is a contact sheet; those of earlier versions carry no text, and the manifest tells how many there are."""
        return is_marked(path) or (path.name in sheet_names(len(self._listed)) and _opens(path, without_texts=True))

    def foreign(self, names: Iterable[str], with_report: bool) -> list[Path]:
        """The files and folders that are not ours where a run would write.

        Args:
            names: Of the run's pictures.
            with_report: Whether it writes reports.
        """
        names, found = list(names), []
        for name in names:
            files = picture_files(name, self._folder)
            found += [path for path in files[: 3 if with_report else 2] if _is_there(path) and not self.is_picture(path, name)]
            found += [files.page] if with_report and _is_there(files.page) and not self.is_page(files.page, name) else []
        sheets = [self._folder / name for name in sheet_names(len(names))]
        found += [path for path in sheets if _is_there(path) and not self.is_sheet(path)]
        overview, manifest = self._folder / OVERVIEW, self._folder / MANIFEST
        if (with_report or self._reported) and _is_there(overview) and not self.is_overview(overview):
            found.append(overview)
        if _is_there(manifest) and not (_is_file(manifest) and (read_manifest(self._folder) or not manifest.stat().st_size)):
            found.append(manifest)
        journals = sorted(path for path in self._folder.glob(".journal_*") if JOURNAL.fullmatch(path.name))
        return found + [path for path in journals if not _is_journal(path)]


def check_own(folder: Path, names: Collection[str], with_report: bool) -> None:
    """Check that a run replaces nothing in its folder but what an earlier one has written.

    Raises:
        ValueError: Something else has a name that the run would write.
    """
    foreign = OwnFiles(folder).foreign(names, with_report)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        what = "a folder" if foreign[0].is_dir() and not foreign[0].is_symlink() else "no file that an earlier run has written there"
        raise ValueError(
            f"inference.output_dir: {foreign[0]}{more} would be replaced, but it is {what}. Move it away, or name another folder."
        )


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _is_file(path: Path) -> bool:
    """Whether a path is an ordinary file, or leads to one; pipes and devices are not opened."""
    return path.is_file()


def is_marked(path: Path) -> bool:
    """Whether a PNG says how we made it, be it whole or damaged further down."""
    return _is_file(path) and _MARK in _head(path)


def _is_journal(path: Path) -> bool:
    """Whether a file is a journal, maybe with half a line; no link is one, for it would be written through it."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return False
    head = _head(path).lstrip()[: len(_JOURNAL_HEAD)]
    return _JOURNAL_HEAD.startswith(head)


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD)
    except OSError:
        return b""


def _opens(path: Path, without_texts: bool = False) -> bool:
    """Whether a path is a whole picture, if asked for without any text."""
    if not _is_file(path):
        return False
    try:
        with Image.open(path) as picture:
            picture.load()
            return not (without_texts and (picture.format != "PNG" or picture.info))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
