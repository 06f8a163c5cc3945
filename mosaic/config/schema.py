"""Typed, validated, frozen sections for JSON settings.

A section is a frozen dataclass that derives from `Section`. Its annotations are the whole schema: `bool`, `int`, `float`, `str`,
`Literal`, `tuple[...]`, unions with `None`, and `Annotated` with `Bounds` or `NotEmpty` for ranges. Every check runs in
`__post_init__`, so a section is valid however it was made. Standard library only.
"""

import dataclasses
import math
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from mosaic.files import nearest, shown


class Bounds(NamedTuple):
    """Range of a number. None means unbounded on that side; `above` and `below` exclude their value, `minimum` and `maximum` include it."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def describe(self) -> str:
        """Return the range in words, such as ' of at least 0 and at most 1'."""
        words = {"at least": self.minimum, "more than": self.above, "at most": self.maximum, "less than": self.below}
        parts = [f"{word} {value:g}" for word, value in words.items() if value is not None]
        return f" of {' and '.join(parts)}" if parts else ""

    def holds(self, value: float) -> bool:
        """Return whether a number lies in the range."""
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


class NotEmpty(NamedTuple):
    """Marks a string that must hold more than white space."""

    def describe(self) -> str:
        """Return the condition in words."""
        return " that is not empty"

    def holds(self, value: str) -> bool:
        """Return whether the string holds more than white space."""
        return bool(value.strip())


class FieldError(ValueError):
    """A setting that does not fit the schema.

    Attributes:
        path: Dotted path of the setting, such as "lora.rank".
        problem: What must hold, what was given and the cure, without the place.
    """

    def __init__(self, path: str, problem: str, source: str | None = None) -> None:
        self.path = path
        self.problem = problem
        end = f" ({source})." if source else ("" if problem.endswith("?") else ".")
        super().__init__(f"{path} {problem}{end}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Base of all sections: checks every field against its annotation and stores lists as tuples and integers of float fields as floats."""

    path: ClassVar[str] = ""
    """Name of the section in the JSON file; the first part of the dotted path in messages."""

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            FieldError: A value has the wrong type or is out of range.
        """
        hints = get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, _checked(value, hints[field.name], f"{self.path}.{field.name}"))


SectionType = TypeVar("SectionType", bound=Section)


def build_section(section_type: type[SectionType], values: object) -> SectionType:
    """Make a section from the object that stood in a JSON file.

    Args:
        section_type: The dataclass to make.
        values: The parsed JSON value, which must be an object; missing keys take their defaults.

    Raises:
        FieldError: The value is no object, has an unknown key, or a value does not fit.
    """
    if not isinstance(values, Mapping):
        raise FieldError(section_type.path, f"must be an object of settings, got {shown(values)}")
    refuse_unknown_keys(values, [field.name for field in dataclasses.fields(section_type)], section_type.path)
    return section_type(**values)


def refuse_unknown_keys(given: Iterable[str], known: list[str], section: str) -> None:
    """Raise FieldError for the first key that is not known, naming the nearest known one.

    Args:
        given: Keys found.
        known: Keys allowed.
        section: Dotted path of the object that holds the keys; "" for the top level.
    """
    for key in given:
        if key not in known:
            cure = nearest(key, known) or f" Known here: {', '.join(known)}."
            raise FieldError(f"{section}.{key}" if section else key, f"is not a known setting.{cure}".rstrip("."))


def to_plain(value: object) -> Any:
    """Return dataclasses as dicts and tuples as lists, all the way down, ready for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [to_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _checked(value: object, hint: Any, path: str) -> Any:
    """Return the value in the form its annotation asks for, or raise FieldError."""
    matched, result = _match(value, hint)
    if not matched:
        words = [str(word) for word in _literals(hint)]
        cure = nearest(value, words) if isinstance(value, str) else ""
        raise FieldError(path, f"must be {_describe(hint)}, got {shown(value)}{'.' if cure else ''}{cure}".rstrip("."))
    return result


def _match(value: object, hint: Any) -> tuple[bool, Any]:
    """Return whether the value fits the annotation, and the value in stored form."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        matched, result = _match(value, arguments[0])
        return matched and all(condition.holds(result) for condition in arguments[1:]), result
    if origin in (Union, types.UnionType):
        return next((found for found in (_match(value, option) for option in arguments) if found[0]), (False, None))
    if origin is Literal:
        return any(type(value) is type(word) and value == word for word in arguments), value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False, None
        if not arguments:
            return not value, ()
        options = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(options) != len(value) or not value:
            return False, None
        found = [_match(item, option) for item, option in zip(value, options, strict=True)]
        return all(matched for matched, _ in found), tuple(item for _, item in found)
    if hint is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)
        return is_number, float(value) if is_number else None
    if hint is int:
        # True is an int in Python; a switch where a number belongs is a mistake. Beyond 64 bits no library takes it.
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63, value
    return isinstance(value, hint), value


def _describe(hint: Any) -> str:
    """Return an annotation in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _describe(arguments[0]) + "".join(condition.describe() for condition in arguments[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in arguments)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(shown(word) for word in arguments)
    if origin is tuple:
        if not arguments:
            return "an empty list"
        if arguments[-1] is Ellipsis:
            return f"a list of one or more values, each {_describe(arguments[0])}"
        return f"a list of {len(arguments)} values, each {_describe(arguments[0])}"
    return {bool: "true or false", int: "an integer", float: "a number", str: "a string", types.NoneType: "null"}[hint]


def _literals(hint: Any) -> list[Any]:
    """Return all words that an annotation allows."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [word for argument in get_args(hint) for word in _literals(argument)]
