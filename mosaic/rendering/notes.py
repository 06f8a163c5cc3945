"""What is noted of the pictures of an output folder: a line each, in the manifest and, while a run goes on, in the journals."""

import json
import re
from pathlib import Path
from typing import Any

MANIFEST = "manifest.jsonl"
JOURNAL = re.compile(r"\.journal_\d+\.jsonl")


def journal_path(folder: Path, process_index: int) -> Path:
    """The journal of a process."""
    return folder / f".journal_{process_index}.jsonl"


def journal_paths(folder: Path) -> list[Path]:
    """The journals that are there."""
    return sorted(path for path in folder.glob(".journal_*.jsonl") if JOURNAL.fullmatch(path.name))


def read_notes(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """By name and digest, the last that manifest and journals of a folder say of a picture.

    Which of two journals is the later one cannot be known, for a picture may go to another process when its run is started again. So
    that a picture was made counts more than that it once could not be.
    """
    journals = _read_journals(folder)
    journals.sort(key=lambda note: "error" not in note)
    return {(note["name"], note["digest"]): note for note in [*_read_lines(folder / MANIFEST), *journals]}


def read_failures(folder: Path) -> dict[tuple[str, str], str]:
    """By name and digest, why a picture could not be made, as the journals of a folder say; it may have been made since."""
    return {(note["name"], note["digest"]): str(note["error"]) for note in _read_journals(folder) if "error" in note}


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder's manifest; none where there is no manifest."""
    return _read_lines(folder / MANIFEST)


def _read_journals(folder: Path) -> list[dict[str, Any]]:
    return [note for path in journal_paths(folder) for note in _read_lines(path)]


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
