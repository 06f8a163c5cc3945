"""The cases file: prompts with their reference pictures, checked completely before anything is computed."""

from pathlib import Path
from typing import Any, NamedTuple

from mosaic.images import load_image, prepare_reference
from mosaic.schema import read_json, shown

KEYS = ("index", "prompt", "image_paths")
MAX_INDEX = 999_999_999  # the index names files


class Case(NamedTuple):
    """One picture to make.

    Attributes:
        index: Number in the names of the case's output files; unique within a cases file.
        prompt: Text, not empty.
        image_paths: Reference pictures, one or more, as paths from the current directory.
    """

    index: int
    prompt: str
    image_paths: tuple[Path, ...]


def load_cases(path: str | Path, reference_size: int = 512, reference_scale: float = 0.9) -> list[Case]:
    """Read a cases file: `[{"index": 0, "prompt": "...", "image_paths": ["..."]}]`, paths relative to the file.

    Every picture is decoded and prepared once, so that no case fails after others have been rendered.

    Args:
        path: The JSON file.
        reference_size: Side in pixels for which the references will be prepared.
        reference_scale: Share of that side that the subject's long side will fill.

    Returns:
        The cases in the order of the file.

    Raises:
        FileNotFoundError: The file or a picture is missing.
        ValueError: Anything else is wrong with the file or a picture. Messages name the file and the place, such as
            `cases.json[3].image_paths[1]: ...`.
    """
    path = Path(path)
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: must be a list of cases, got {_kind(entries)}: {_FORM}")
    if not entries:
        raise ValueError(f"{path}: must hold at least one case, got an empty list: {_FORM}")
    cases = [_read_case(entry, f"{path}[{number}]", path.parent) for number, entry in enumerate(entries)]
    first: dict[int, int] = {}
    for number, case in enumerate(cases):
        if first.setdefault(case.index, number) != number:
            raise ValueError(
                f"{path}[{number}].index: must be unique, since it names the output files, but {case.index} is also the index of "
                f"{path}[{first[case.index]}]."
            )
    _check_pictures(cases, path, reference_size, reference_scale)
    return cases


_FORM = 'expected [{"index": 0, "prompt": "...", "image_paths": ["..."]}].'


def _read_case(entry: Any, place: str, folder: Path) -> Case:
    """Check the keys and types of one case; no picture is opened."""
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: must be an object with the keys {', '.join(KEYS)}, got {_kind(entry)}.")
    unknown = [key for key in entry if key not in KEYS]
    missing = [key for key in KEYS if key not in entry]
    if missing:
        found = f" Found instead: {', '.join(unknown)}." if unknown else ""
        raise ValueError(f'{place}: the key "{missing[0]}" is missing.{found}')
    if unknown:
        raise ValueError(f"{place}.{unknown[0]}: is not a known key. Known here: {', '.join(KEYS)}.")
    index, prompt, image_paths = (entry[key] for key in KEYS)
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index <= MAX_INDEX:
        raise ValueError(f"{place}.index: must be an integer from 0 to {MAX_INDEX} (it names the output files), got {shown(index)}.")
    _check_text(prompt, f"{place}.prompt")
    if not isinstance(image_paths, list):
        raise ValueError(f"{place}.image_paths: must be a list of paths of reference pictures, got {shown(image_paths)}.")
    if not image_paths:
        raise ValueError(f"{place}.image_paths: must name at least one reference picture, got an empty list.")
    for number, image_path in enumerate(image_paths):
        _check_text(image_path, f"{place}.image_paths[{number}]")
    return Case(index, prompt, tuple(folder / image_path for image_path in image_paths))


def _check_text(value: Any, place: str) -> None:
    """Raise ValueError unless the value is a string with something in it that can be encoded."""
    if not isinstance(value, str):
        raise ValueError(f"{place}: must be a string, got {shown(value)}.")
    if not value.strip():
        raise ValueError(f"{place}: must not be empty, got {shown(value)}.")
    if "\x00" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{place}: must be plain text, but it holds a NUL or half of a surrogate pair: {value!a}.")


def _check_pictures(cases: list[Case], path: Path, reference_size: int, reference_scale: float) -> None:
    """Decode and prepare every picture once, naming the case in errors."""
    checked: set[Path] = set()
    for number, case in enumerate(cases):
        for position, image_path in enumerate(case.image_paths):
            if image_path in checked:
                continue
            place = f"{path}[{number}].image_paths[{position}]"
            try:
                image = load_image(image_path)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{place}: {error} Paths are relative to the JSON file.") from error
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            try:
                prepare_reference(image, reference_size, reference_scale)
            except ValueError as error:
                raise ValueError(f"{place}: {image_path}: {error}") from error
            checked.add(image_path)


def _kind(value: Any) -> str:
    """Return the JSON type of a value in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names[type(value)]
