"""UNO-style lists: a JSON list of `{"prompt", "image_paths" (or "image_path"), "image_tgt_path"}`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mosaic.data.multi_reference.records import ReferenceRecord, SampleRecord
from mosaic.data.multi_reference.storage import Folder
from mosaic.files import parse_json, read_text, relative_path, shown
from preprocess.sources.invalid import InvalidSamples
from preprocess.sources.pairs import unmatched_sample


def samples(
    path: Path, invalid: InvalidSamples, split: str = "train", grid: int = 64, image_root: Path | None = None
) -> Iterator[SampleRecord]:
    """Yield the samples in the order of the list.

    Args:
        path: The JSON file.
        invalid: What to do with entries that cannot be converted.
        split: Split of all samples.
        grid: Cells per side of a square picture.
        image_root: Folder that the paths are relative to; None: that of the file.

    Raises:
        FileNotFoundError, ValueError: The file is missing or no list; or an entry is invalid and not skipped.
    """
    folder = Folder(image_root or path.parent)
    for number, entry in enumerate(_entries(path)):
        place = f"{path}[{number}]"
        with invalid.at(place):
            yield _sample(entry, number, place, folder, path.name, split, grid)


def count(path: Path) -> int:
    """Return the number of entries."""
    return len(_entries(path))


def _entries(path: Path) -> list[Any]:
    text = read_text(path)
    try:
        entries = parse_json(text, str(path))
    except ValueError as error:
        if _is_json_lines(text):
            raise ValueError(
                f"{path}: is JSON Lines, an object in every line; it must be one JSON list, [{{...}}, {{...}}]. Make it one: "
                f"`jq -s . {path} > list.json`, and give --image-root {path.parent} where list.json lies elsewhere."
            ) from error
        raise
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'{path}: must be a list of {{"prompt", "image_paths", "image_tgt_path"}}, got {shown(entries)}.')
    return entries


def _sample(entry: Any, number: int, place: str, folder: Folder, source: str, split: str, grid: int) -> SampleRecord:
    """Convert one entry."""
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: must be an object, got {shown(entry)}.")
    if not isinstance(entry.get("prompt"), str):
        raise ValueError(f"{place}.prompt: must be a string, got {shown(entry.get('prompt'))}.")
    if "image_paths" in entry and "image_path" in entry:
        raise ValueError(f"{place}: must have image_paths or image_path, got both; one of them would be left out.")
    name = "image_paths" if "image_paths" in entry else "image_path"
    paths = entry.get(name)
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not paths:
        raise ValueError(f"{place}.{name}: must be a list of one or more paths, got {shown(paths)}.")
    given = [("image_tgt_path", entry.get("image_tgt_path")), *((f"{name}[{k}]", value) for k, value in enumerate(paths))]
    target, *references = [folder.read(_path(value, f"{place}.{field}", folder), f"{place}.{field}") for field, value in given]
    return unmatched_sample(
        target,
        [ReferenceRecord(data) for data in references],
        entry["prompt"],
        {"source": "uno", "file": source, "entry": number, "image_tgt_path": entry["image_tgt_path"], "image_paths": paths},
        split,
        grid,
    )


def _path(value: Any, place: str, folder: Folder) -> str:
    """Return a path of the list, or raise ValueError with the form that it must have."""
    try:
        return relative_path(value, place)
    except ValueError as error:
        raise ValueError(
            f'{error} Paths of the list are relative to --image-root (now {folder.root}): write them as "images/1.png", and name the '
            "folder that holds all pictures by --image-root."
        ) from error


def _is_json_lines(text: str) -> bool:
    """Whether each of the first two lines of a text is an object."""
    lines = [line for line in text.splitlines() if line.strip()][:2]
    try:
        return len(lines) == 2 and all(isinstance(parse_json(line, "a line"), dict) for line in lines)
    except ValueError:
        return False
