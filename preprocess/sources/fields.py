"""Fields of the rows of a list, by name.

`caption` is a column; `caption.short` a part of an object in it; `images.0` an element of a list; `subjects.*.image` that part of every
element of a list (a value that is no list counts as a list of one); `ref_{0}` the columns ref_0, ref_1, ... (`ref_{1}`: from ref_1).
`a|b` is whichever of the two a row has.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from mosaic.files import shown

_NUMBERED = re.compile(r"\{([01])\}")


class Cell(NamedTuple):
    """A value of a row; None where the row has none.

    Attributes:
        value: As the list has it.
        place: Where it stands, for messages.
    """

    value: Any
    place: str


def problem(field: str) -> str | None:
    """What is wrong with the text of a field in a mapping, None if nothing is."""
    for name in field.split("|"):
        if not all(name.split(".")):
            return 'must be names joined by "." or "|", none of them empty'
        if "{" in name and (len(_NUMBERED.findall(name)) != 1 or _NUMBERED.sub("", name).count("{") or "." in name):
            return 'must hold "{0}" or "{1}", from which its columns are numbered, once, and be a column by itself'
    return None


def holds_many(field: str) -> bool:
    """Whether a field means a list of values by its form."""
    return "{" in field or any("*" in name.split(".") for name in field.split("|"))


def columns(field: str, names: Collection[str]) -> list[str]:
    """The columns of a file that a field is found in, as far as they are there."""
    found: list[str] = []
    for name in field.split("|"):
        if "{" in name:
            found += [name for _, name in sorted(_numbered(name, names).items())]
        else:
            found += [part for part in (name, name.split(".")[0]) if part in names][:1]
    return list(dict.fromkeys(found))


def require_columns(field: str, names: Collection[str], place: str) -> None:
    """Refuse a file that lacks the columns of a field, or whose numbered columns have a gap.

    Raises:
        ValueError: Such a file.
    """
    for name in field.split("|"):
        _require_no_gap(name, names, place)
    if not columns(field, names):
        wanted = " or ".join(_NUMBERED.sub(r"\1", name).split(".")[0] for name in field.split("|"))
        raise ValueError(f"{place}: the column {wanted} is missing. Found: {', '.join(names)}.")


def one(values: Mapping[str, Any], field: str, place: str) -> Cell:
    """The value of a field that means one.

    Args:
        values: The row.
        field: Its name in the mapping.
        place: Of the row.

    Raises:
        ValueError: The row has several of the alternatives, or other kinds of values on the way.
    """
    return _chosen(values, field, place, None)[0]


def many(values: Mapping[str, Any], field: str, place: str, count: int | None = None) -> list[Cell]:
    """The values of a field that may mean several: a list's elements, numbered columns, or one value.

    Args:
        values: The row.
        field: Its name in the mapping.
        place: Of the row.
        count: How many numbered columns are meant, of which each may be missing; None: those that are there.

    Raises:
        ValueError: As `one`; or numbered columns have a gap.
    """
    cells = _chosen(values, field, place, count)
    if not holds_many(field) and isinstance(cells[0].value, list):
        return [Cell(value, f"{cells[0].place}[{k}]") for k, value in enumerate(cells[0].value)]
    return cells


def _chosen(values: Mapping[str, Any], field: str, place: str, count: int | None) -> list[Cell]:
    """The cells of the one alternative that the row has; those of the first one, without values, where it has none."""
    found = {name: _cells(values, name, place, count) for name in field.split("|")}
    present = [name for name, cells in found.items() if any(cell.value is not None for cell in cells)]
    if len(present) > 1:
        several = "both" if len(present) == 2 else "all"
        names = " or ".join(dict.fromkeys(name.removesuffix(".*") for name in present))
        raise ValueError(f"{place}: must have {names}, got {several}; one of them would be left out.")
    return found[present[0]] if present else next(iter(found.values()))


def _cells(values: Mapping[str, Any], name: str, place: str, count: int | None) -> list[Cell]:
    """The cells of a field without alternatives."""
    if "{" in name:
        if count is None:
            _require_no_gap(name, values, place)
        start = int(_start(name))
        numbers = sorted(_numbered(name, values)) if count is None else range(start, start + count)
        return [Cell(values.get(column), f"{place}.{column}") for column in (_NUMBERED.sub(str(k), name) for k in numbers)]
    return list(_walk(values, place, [name] if name in values else name.split(".")))


def _walk(value: Any, place: str, names: list[str]) -> Iterator[Cell]:
    """What a value holds along names."""
    if not names or value is None:
        yield Cell(value, ".".join([place, *(name for name in names if name != "*")]))
    elif names[0] == "*":
        for k, item in enumerate(value if isinstance(value, list) else [value]):
            yield from _walk(item, f"{place}[{k}]", names[1:])
    elif isinstance(value, Mapping):
        yield from _walk(value.get(names[0]), f"{place}.{names[0]}", names[1:])
    elif isinstance(value, list) and names[0].isdecimal():
        k = int(names[0])
        yield from _walk(value[k] if k < len(value) else None, f"{place}[{k}]", names[1:])
    else:
        raise ValueError(f"{place}: must hold {names[0]}, got {shown(value)}.")


def _start(name: str) -> str:
    """The number that columns are numbered from."""
    return _NUMBERED.findall(name)[0]


def _numbered(name: str, names: Collection[str]) -> dict[int, str]:
    """The numbered columns that are there, whatever the case of their letters, by number."""
    before, _, after = _NUMBERED.split(name)
    pattern = re.compile(re.escape(before) + r"(\d{1,4})" + re.escape(after), re.IGNORECASE | re.ASCII)
    return {int(match[1]): match[0] for match in map(pattern.fullmatch, names) if match}


def _require_no_gap(name: str, names: Collection[str], place: str) -> None:
    """Refuse numbered columns behind a gap, or of other letters: they would be left out."""
    if "{" not in name:
        return
    start = int(_start(name))
    first, second = (_NUMBERED.sub(str(start + k), name) for k in range(2))
    found = _numbered(name, names)
    if found and first not in names:
        raise ValueError(f"{place}: the column {first} is missing. Found: {', '.join(names)}.")
    for k, column in enumerate(column for _, column in sorted(found.items())):
        wanted = _NUMBERED.sub(str(start + k), name)
        if column != wanted:
            raise ValueError(
                f"{place}: the column {column} would be left out: references are {first}, {second}, ... without a gap, and {wanted} is "
                "missing. Rename the columns."
            )
