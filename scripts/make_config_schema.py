"""Writes configs/schema.json, the JSON Schema of config files, from the dataclasses of `mosaic.config.sections`.

Editors that understand the "$schema" key of a config complete names, show what each setting means, and mark what is wrong.
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mosaic.config import sections
from mosaic.config.loading import EXTENDS, SECTIONS
from mosaic.config.schema import Bounds, NotEmpty, Section, to_plain
from mosaic.files import write_text

FILE = ROOT / "configs" / "schema.json"
_PRIMITIVES = {bool: "boolean", int: "integer", float: "number", str: "string", types.NoneType: "null"}
_BOUNDS = {"minimum": "minimum", "maximum": "maximum", "above": "exclusiveMinimum", "below": "exclusiveMaximum"}


def type_schema(hint: Any) -> dict[str, Any]:
    """The JSON Schema of an annotation that `mosaic.config.schema` knows."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        schema = type_schema(arguments[0])
        for condition in arguments[1:]:
            schema |= _condition_schema(condition)
        return schema
    if origin in (Union, types.UnionType):
        return {"anyOf": [type_schema(option) for option in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple and not arguments:
        return {"type": "array", "maxItems": 0}
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return {"type": "array", "items": type_schema(arguments[0]), "minItems": 1}
        items = [type_schema(argument) for argument in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    return {"type": _PRIMITIVES[hint]}


def _condition_schema(condition: Bounds | NotEmpty) -> dict[str, Any]:
    if isinstance(condition, NotEmpty):
        return {"pattern": r"\S"}
    return {word: value for name, word in _BOUNDS.items() if (value := getattr(condition, name)) is not None}


def field_meanings(section: type[Section]) -> dict[str, str]:
    """What stands below each field of a section, on one line."""
    body = ast.parse(inspect.getsource(section)).body[0].body
    meanings = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            meanings[field.target.id] = " ".join(text.value.value.split())
    return meanings


def section_schema(section: type[Section]) -> dict[str, Any]:
    """The JSON Schema of one section: its fields with type, meaning and default."""
    hints, meanings = get_type_hints(section, include_extras=True), field_meanings(section)
    defaults, properties = section(), {}
    for field in dataclasses.fields(section):
        schema = {"description": meanings[field.name]} | type_schema(hints[field.name])
        from_preset = section is sections.LossConfig and field.name in sections.LOSS_PRESETS["paper"]
        properties[field.name] = schema if from_preset else schema | {"default": to_plain(getattr(defaults, field.name))}
    description = " ".join(inspect.getdoc(section).split())
    return {"type": "object", "description": description, "additionalProperties": False, "properties": properties}


def config_schema() -> dict[str, Any]:
    """The JSON Schema of a config file."""
    properties: dict[str, Any] = {
        "$schema": {"type": "string", "description": "For editors; without effect."},
        "$comment": {"type": "string", "description": "For people; without effect."},
        EXTENDS: {"type": "string", "description": "Config file, relative to this one, whose settings hold where this one gives none."},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Config of MOSAIC for FLUX",
        "type": "object",
        "additionalProperties": False,
        "properties": properties | {name: section_schema(section) for name, section in SECTIONS.items()},
    }


def schema_text() -> str:
    """What configs/schema.json must hold."""
    return json.dumps(config_schema(), indent=2, ensure_ascii=False) + "\n"


def write_schema(file: Path, text: str) -> None:
    """Write a generated file."""
    write_text(file, text)
    print(f"{file.relative_to(ROOT)}: written")


def main(argv: list[str] | None = None) -> None:
    """Write the file."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    write_schema(FILE, schema_text())


if __name__ == "__main__":
    main()
