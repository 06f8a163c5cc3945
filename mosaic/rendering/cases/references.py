"""The references of a case: paths, patterns, names that the prompt may use, and strengths."""

import glob
import itertools
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mosaic.files import nearest, shown
from mosaic.images import picture_suffixes
from mosaic.pipeline.options import check_strength

MAX_REFERENCES = 64  # per case
MAX_MATCHES = 10_000  # pictures that one pattern may name
MAX_TEXT = 10_000  # letters; T5 reads at most 512 tokens
MAX_PATH = 4096  # letters
MAX_POINTS = 20  # per reference
MAX_SIDE = 1_000_000  # px
KEYS = ("path", "name", "strength", "points")
_NAME = re.compile(r"\w(?:[\w -]*\w)?")
_PLACEHOLDER = re.compile(r"<([^<>]*)>")


class Reference(NamedTuple):
    """A reference picture of a case.

    Attributes:
        path: The file, as a path from the current directory.
        name: The name under which the prompt speaks of it, as `<name>`; None: it has none.
        strength: Weight of its keys in attention: 1 changes nothing, 0 hides it.
        points: Pixels (x, y) of the picture whose attention the report follows; none: the strongest. They do not change what is generated.
    """

    path: Path
    name: str | None = None
    strength: float = 1.0
    points: tuple[tuple[int, int], ...] = ()


def read_references(value: Any, place: str, folder: Path) -> tuple[Reference, ...]:
    """Read the value of `references`; no picture is opened.

    Args:
        value: A list of paths, patterns such as "bags/*.png", and objects {"path", "name", "strength", "points"}; or an object that gives a
            path or an object for every name.
        place: Where the value stands, for messages.
        folder: Folder at which relative paths start.

    Returns:
        The references in the order of the value; those of a pattern in the order of their paths.

    Raises:
        ValueError: Anything is wrong with the value.
    """
    if isinstance(value, dict) and "path" in value and len(value) > 1 and all(key in KEYS for key in value):
        raise ValueError(f"{place}: must be a list where a reference is an object: put it into brackets, [{shown(value)}].")
    if isinstance(value, dict):
        items = [(f"{place}.{name}", _with_name(item, name, f"{place}.{name}")) for name, item in value.items()]
    elif isinstance(value, list):
        items = [(f"{place}[{number}]", item) for number, item in enumerate(value)]
    else:
        raise ValueError(f"{place}: must be a list of paths of reference pictures, got {shown(value)}.")
    if not items:
        kind = "object" if isinstance(value, dict) else "list"
        raise ValueError(f"{place}: must name at least one reference picture, got an empty {kind}.")
    if len(items) > MAX_REFERENCES:
        raise ValueError(f"{place}: must name at most {MAX_REFERENCES} reference pictures, got {len(items)}.")
    references = tuple(itertools.chain.from_iterable(_read_item(item, where, folder) for where, item in items))
    if len(references) > MAX_REFERENCES:
        raise ValueError(f"{place}: must name at most {MAX_REFERENCES} reference pictures, got {len(references)}.")
    names = [reference.name for reference in references if reference.name is not None]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{place}: a name must stand for one reference picture, but {shown(twice)} stands for {names.count(twice)}.")
    return references


def read_paths(value: Any, place: str, folder: Path) -> tuple[Reference, ...]:
    """Read the value of `image_paths`, which holds paths and patterns alone; otherwise as `read_references`."""
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, dict) for item in items):
        cure = 'names, strengths and points go under "references", such as {"bag": "bag.png"}'
        raise ValueError(f"{place}: must be a list of paths of reference pictures, got {shown(value)}: {cure}.")
    return read_references(value, place, folder)


def named_prompt(prompt: str, references: Sequence[Reference], place: str) -> str:
    """The prompt as the model sees it: every `<name>` as the name itself.

    Raises:
        ValueError: The prompt uses a name that no reference has, or leaves one out.
    """
    names = [reference.name for reference in references if reference.name is not None]
    used = {unicodedata.normalize("NFC", word.strip()) for word in _PLACEHOLDER.findall(prompt)}
    unknown = sorted(used.difference(names))
    if unknown:
        known = f"The names here: {', '.join(names)}." if names else 'Give names as "references": {"bag": "bag.png"}.'
        raise ValueError(f"{place}: <{unknown[0]}> names no reference of this case.{nearest(unknown[0], names)} {known}")
    unused = [name for name in names if name not in used]
    if unused:
        cure = "write it into the prompt, or give that reference no name"
        if unused[0] == "path":
            cure += '; a single object is written [{"path": "bag.png"}]'
        raise ValueError(f"{place}: must use every name, but <{unused[0]}> is missing: {cure}.")
    return _PLACEHOLDER.sub(lambda match: match[1].strip(), prompt)


def check_text(value: Any, place: str, max_letters: int = MAX_TEXT) -> None:
    """Raise ValueError unless the value is a string with something in it that can be encoded, and not too long."""
    if not isinstance(value, str):
        raise ValueError(f"{place}: must be a string, got {shown(value)}.")
    if not value.strip():
        raise ValueError(f"{place}: must not be empty{f', got {shown(value)}' if value else ''}.")
    if len(value) > max_letters:
        raise ValueError(f"{place}: must have at most {max_letters} letters, got {len(value)}.")
    if "\x00" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{place}: must be plain text, but it holds a NUL or half of a surrogate pair: {shown(ascii(value))}.")


def match_pictures(pattern: str, place: str, folder: Path) -> list[str]:
    """Paths from `folder` of the picture files that a pattern with *, ? or [ ] names, sorted; a plain path is returned as it is.

    Raises:
        ValueError: The pattern goes through all folders, or names no picture or too many.
    """
    if not glob.has_magic(pattern) or _is_file(folder / pattern):
        return [pattern]
    if "**" in pattern:
        raise ValueError(f'{place}: a pattern must not hold "**", which goes through all folders below: {shown(pattern)}. Name the folder.')
    found = glob.iglob(pattern, root_dir=folder or None)
    pictures = (path for path in found if Path(path).suffix.lower() in picture_suffixes() and _is_file(folder / path))
    matches = sorted(itertools.islice(pictures, MAX_MATCHES + 1))
    if not matches:
        raise ValueError(f"{place}: no picture file matches {shown(pattern)}. Patterns are relative to the cases file.")
    if len(matches) > MAX_MATCHES:
        raise ValueError(f"{place}: must match at most {MAX_MATCHES} pictures: {shown(pattern)} matches more.")
    return matches


def _read_item(item: Any, place: str, folder: Path) -> list[Reference]:
    """References of one path, pattern or object."""
    if not isinstance(item, dict):
        check_text(item, place, MAX_PATH)
        return [Reference(folder / path) for path in match_pictures(item, place, folder)]
    unknown = [key for key in item if key not in KEYS]
    if unknown:
        raise ValueError(f"{place}.{unknown[0]}: is not a known key.{nearest(unknown[0], KEYS)} Known here: {', '.join(KEYS)}.")
    if "path" not in item:
        raise ValueError(f'{place}: the key "path" is missing.')
    check_text(item["path"], f"{place}.path", MAX_PATH)
    name, strength = item.get("name"), item.get("strength", 1)
    if name is not None:
        check_text(name, f"{place}.name")
        name = unicodedata.normalize("NFC", name)
        if not _is_name(name):
            raise ValueError(f"{place}.name: must be made of letters, digits, spaces and hyphens, got {shown(name)}.")
    check_strength(strength, f"{place}.strength:", shown)
    points = _read_points(item.get("points", []), f"{place}.points")
    paths = match_pictures(item["path"], f"{place}.path", folder)
    for key, given in (("a name must stand for", name is not None), ("points must lie on", bool(points))):
        if given and len(paths) > 1:
            raise ValueError(f"{place}: {key} one picture, but {shown(item['path'])} matches {len(paths)}.")
    return [Reference(folder / path, name, float(strength), points) for path in paths]


def _is_name(name: str) -> bool:
    """Whether a name is made of letters, with the marks that some scripts write on them, digits, spaces and hyphens."""
    letters = ""
    for letter in name:
        if not (unicodedata.category(letter).startswith("M") and letters[-1:].isalnum()):
            letters += letter
    return _NAME.fullmatch(letters) is not None


def _read_points(value: Any, place: str) -> tuple[tuple[int, int], ...]:
    """Points of a reference; whether they lie on its picture is not known yet."""
    if not isinstance(value, list) or len(value) > MAX_POINTS:
        raise ValueError(f"{place}: must be a list of at most {MAX_POINTS} points [x, y], in pixels of the picture, got {shown(value)}.")
    for number, point in enumerate(value):
        if not isinstance(point, list) or len(point) != 2 or any(type(x) is not int or not 0 <= x < MAX_SIDE for x in point):
            expected = f"two integers [x, y] in [0, {MAX_SIDE}), pixels of the picture"
            raise ValueError(f"{place}[{number}]: must be {expected}, got {shown(point)}.")
    return tuple((x, y) for x, y in value)


def _with_name(item: Any, name: str, place: str) -> dict[str, Any]:
    """The value of a name in an object of references, as an object with that name."""
    if isinstance(item, dict):
        if "name" in item:
            raise ValueError(f"{place}.name: must not be given here, since {shown(name)} is the name already.")
        return {**item, "name": name}
    check_text(item, place, MAX_PATH)
    return {"path": item, "name": name}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False
