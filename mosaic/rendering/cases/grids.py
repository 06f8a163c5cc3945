"""Grids of cases for studies: every prompt with every set of references."""

from pathlib import Path
from typing import Any

from mosaic.files import shown
from mosaic.rendering.cases.references import MAX_PATH, check_text, match_pictures

MAX_PICTURES = 100_000  # of a file
MAX_PER_CASE = 1000
KEYS = ("prompts", "references")


def num_pictures(entry: dict[str, Any]) -> int:
    """Number of pictures that an entry asks for per case, 1 where it does so in a way that will be refused."""
    seeds, count = entry.get("seeds"), entry.get("num_images_per_prompt")
    if isinstance(seeds, list):
        count = len(seeds)
    return count if type(count) is int and 1 <= count <= MAX_PER_CASE else 1


def expand_grid(entry: dict[str, Any], place: str, folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """The cases of an entry `{"grid": {"prompts": [...], "references": [...]}, ...}`, prompts outermost.

    A member of the grid's references is what one case has: a list, or an object with names; or a path or pattern, each of whose pictures is
    the only reference of a case. All keys beside "grid" hold for each of its cases; "index" is that of the first.

    Returns:
        Place and keys of every case.

    Raises:
        ValueError: The grid is not of that form, or is too large.
    """
    grid, shared = entry["grid"], {key: value for key, value in entry.items() if key != "grid"}
    where = f"{place}.grid"
    if not isinstance(grid, dict) or sorted(grid) != sorted(KEYS):
        raise ValueError(f"{where}: must be an object with the keys {' and '.join(KEYS)}, got {shown(grid)}.")
    for key in KEYS:
        if not isinstance(grid[key], list) or not grid[key]:
            raise ValueError(f"{where}.{key}: must be a list of one or more values, got {shown(grid[key])}.")
    for key in ("prompt", "references", "image_paths"):
        if key in shared:
            raise ValueError(f"{place}.{key}: must not stand beside grid, which gives it.")
    sets, each = [], num_pictures(entry)
    for number, value in enumerate(grid["references"]):
        name = f"references[{number}]"
        if isinstance(value, str):
            check_text(value, f"{where}.{name}", MAX_PATH)
            sets += [(name, [path]) for path in match_pictures(value, f"{where}.{name}", folder)]
        else:
            sets.append((name, value))
        if len(grid["prompts"]) * len(sets) * each > MAX_PICTURES:
            given = f"{len(grid['prompts'])} prompts x {len(sets)} references or more x {each} pictures"
            raise ValueError(f"{where}: must give at most {MAX_PICTURES} pictures, got {given}. Split it into several files.")
    cases = [
        (f"{where}(prompts[{p}], {name})", {**shared, "prompt": prompt, "references": references})
        for p, prompt in enumerate(grid["prompts"])
        for name, references in sets
    ]
    if isinstance(shared.get("index"), int) and not isinstance(shared["index"], bool):
        return [(name, {**case, "index": shared["index"] + number}) for number, (name, case) in enumerate(cases)]
    return cases
