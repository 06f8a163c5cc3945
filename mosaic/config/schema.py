"""The base of all settings: frozen pydantic models, and their errors in one sentence that names setting, condition, value and cure."""

import json
from collections.abc import Iterable
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from mosaic.files import nearest, shown

MAX_DEPTH = 4  # of lists in lists, in any setting
HALF_PAIR = "must be plain text, but it holds half of a surrogate pair: "


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


def unknown_setting(path: str, word: str, known: Iterable[str], source: str | None = None) -> FieldError:
    """The error for a setting that does not exist; `word`, a part of its dotted path, is none of the `known` names."""
    cure = nearest(word, known) or f" Known here: {', '.join(known)}"
    return FieldError(path, f"is not a known setting.{cure}", source)


def _tidy(schema: dict[str, Any]) -> None:
    """In the JSON Schema of a model: descriptions on one line, and no titles, which repeat the names."""
    for part in (schema, *schema["properties"].values()):
        part.pop("title", None)
        part["description"] = " ".join(part["description"].split())


class Section(BaseModel):
    """Base of all settings. Types are strict: no bool for an int, no string for a number; but an int for a float, and lists for tuples.

    The docstring below a field is its description in the JSON Schema.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        json_schema_extra=_tidy,
    )

    path: ClassVar[str] = ""
    """Name of the section in the JSON file; the first part of the dotted path in messages."""

    def __init__(self, /, **values: Any) -> None:
        """Validate the fields.

        Raises:
            FieldError: An unknown field, a value of the wrong type or out of range, or values that exclude one another.
        """
        try:
            super().__init__(**{name: _as_tuples(value) for name, value in values.items()})
        except ValidationError as error:
            raise _first_error(type(self), error, values) from error
        except UnicodeEncodeError as error:
            name = next((name for name, value in values.items() if _has_half_pair(value)), "")
            raise FieldError(f"{self.path}.{name}".strip("."), f"{HALF_PAIR}{shown(values.get(name))}") from error

    def replace(self, **changes: Any) -> Self:
        """The same settings with other values of some fields, validated, which pydantic's `model_copy` does not do."""
        return type(self)(**(dict(self) | changes))


def _as_tuples(value: Any, depth: int = 0) -> Any:
    """JSON's lists as tuples, as far down as those of any setting go; deeper ones are refused as what they are."""
    return tuple(_as_tuples(item, depth + 1) for item in value) if isinstance(value, list | tuple) and depth < MAX_DEPTH else value


def _has_half_pair(value: Any) -> bool:
    """Whether there is half of a surrogate pair in it, which JSON can write and UTF-8 cannot."""
    return any("\ud800" <= letter <= "\udfff" for letter in json.dumps(value, ensure_ascii=False, default=str))


def _first_error(section: type[Section], error: ValidationError, given: dict[str, Any]) -> FieldError:
    """The first of pydantic's errors as ours. Unknown names come before values: a misspelt setting is the likelier cause."""
    errors = error.errors(include_url=False)
    first = next((found for found in errors if found["type"] == "extra_forbidden"), errors[0])
    ours = first.get("ctx", {}).get("error")  # of a validator of ours, or of a section within
    if isinstance(ours, FieldError):
        return ours
    name = str(first["loc"][0])
    path = f"{section.path}.{name}".lstrip(".")
    if first["type"] == "extra_forbidden":
        return unknown_setting(path, name, section.model_fields)
    if first["type"] == "string_unicode":
        return FieldError(path, f"{HALF_PAIR}{shown(given.get(name))}")
    schema, value = section.model_json_schema()["properties"][name], given.get(name)
    cure = nearest(value, _choices(schema)) if isinstance(value, str) else ""
    return FieldError(path, f"must be {_in_words(schema)}, got {shown(value)}{'.' if cure else ''}{cure}")


RANGE = {"minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most", "exclusiveMaximum": "less than"}
TYPES = {
    "boolean": "true or false",
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "object": "an object",
    "null": "null",
}


def _in_words(schema: dict[str, Any]) -> str:
    """The JSON Schema of a field in words, such as 'an integer of at least 1 or null'."""
    if "anyOf" in schema:
        return " or ".join(_in_words(option) for option in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return ("one of " if "enum" in schema else "") + ", ".join(shown(word) for word in _choices(schema))
    if "$ref" in schema:
        return "an object of settings"
    if schema["type"] == "array":
        return f"a list of {_count_in_words(schema)}, each {_in_words(schema.get('items') or schema['prefixItems'][0])}"
    limits = [f"{words} {schema[key]:g}" for key, words in RANGE.items() if key in schema]
    return TYPES[schema["type"]] + (f" of {' and '.join(limits)}" if limits else "") + (" that is not empty" if "pattern" in schema else "")


def _count_in_words(schema: dict[str, Any]) -> str:
    """How many values an array may hold, in words."""
    least, most = schema.get("minItems", 0), schema.get("maxItems")
    if most is not None:
        return f"{most} values" if least == most else f"{least} to {most} values"
    return "one or more values" if least else "values"


def _choices(schema: dict[str, Any]) -> list[str]:
    """All words that a field allows."""
    words = [schema["const"]] if "const" in schema else schema.get("enum", [])
    return [*words, *(word for option in schema.get("anyOf", ()) for word in _choices(option))]
