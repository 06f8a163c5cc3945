"""Writes configs/cases.schema.json, the JSON Schema of cases files, from `mosaic.rendering.cases` (reading, shapes)."""

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

from mosaic.commands import NOTHING, command
from mosaic.config.sections import MAX_STRENGTH
from mosaic.rendering.cases.reading import MAX_INDEX, CaseOptions
from mosaic.rendering.cases.references import KEYS, MAX_PATH, MAX_POINTS, MAX_REFERENCES, MAX_SIDE, MAX_TEXT
from mosaic.rendering.cases.shapes import IMAGE_PATHS, SHAPES, Shape
from scripts.schemas.config import write_schema

FILE = ROOT / "configs/cases.schema.json"
TEXT = {"type": "string", "pattern": r"\S", "maxLength": MAX_TEXT}
MATCHING = "A picture, relative to the cases file; with *, ? or [ ] all pictures that match, sorted."
PATH = TEXT | {"maxLength": MAX_PATH, "description": MATCHING}
PATHS = {"type": "array", "items": PATH, "minItems": 1, "maxItems": MAX_REFERENCES}
STRENGTH = {
    "description": "How strongly the reference is attended to: 1 is as trained, 0 hides it.",
    "type": "number",
    "minimum": 0,
    "maximum": MAX_STRENGTH,
}

POINTS = {
    "description": "Pixels [x, y] of the picture whose attention the report follows, from its upper left; without them the strongest.",
    "type": "array",
    "maxItems": MAX_POINTS,
    "items": {"type": "array", "items": {"type": "integer", "minimum": 0, "exclusiveMaximum": MAX_SIDE}, "minItems": 2, "maxItems": 2},
}


def options_schema() -> dict[str, Any]:
    """What a case may decide for itself, and its index."""
    index = {"description": "Number in the names of the output files; without it the position in the file.", "type": "integer"}
    return {"index": index | {"minimum": 0, "maximum": MAX_INDEX}, **CaseOptions.model_json_schema()["properties"]}


def references_schema() -> dict[str, Any]:
    """References as a list, or as an object with a name for each."""
    detailed = {"path": PATH, "strength": STRENGTH, "points": POINTS}
    name = TEXT | {"description": "Name under which the prompt speaks of the picture, as <name>."}
    members = {"type": "object", "required": ["path"], "additionalProperties": False}
    listed = {"anyOf": [PATH, {**members, "properties": {**detailed, "name": name | {"type": ["string", "null"]}}}]}
    named = {"anyOf": [PATH, {**members, "properties": detailed}]}
    one = {"required": ["path"], "minProperties": 2, "propertyNames": {"enum": list(KEYS)}}  # a reference that is in no list
    return {
        "anyOf": [
            {"type": "array", "items": listed, "minItems": 1, "maxItems": MAX_REFERENCES},
            {"type": "object", "additionalProperties": named, "minProperties": 1, "maxProperties": MAX_REFERENCES, "not": one},
        ]
    }


def foreign_schema(shape: Shape) -> dict[str, Any]:
    """A case with the keys of another project."""
    properties = {"prompt": TEXT, IMAGE_PATHS: PATHS}
    properties = {key: value for key, value in properties.items() if key not in shape.renamed.values()}
    properties |= {key: TEXT if ours == "prompt" else PATHS for key, ours in shape.renamed.items()}
    required = list(shape.renamed) or ["prompt"]
    if shape.one_path:
        properties[shape.one_path] = PATH
    patterns = {}
    if shape.path_prefix:
        properties.pop(IMAGE_PATHS)
        patterns = {"patternProperties": {f"^{shape.path_prefix}[0-9]+$": PATH}}
        required = ["prompt", f"{shape.path_prefix}0"]
    unused = {key: {"description": "Without effect; a note says so."} for key in shape.unused}
    told: dict[str, Any] = {"anyOf": [{"required": [key]} for key in shape.told_by]}
    schema = {"title": f"A case of {shape.name}", "type": "object", "required": required, "additionalProperties": False, **patterns}
    if shape.one_path:
        told = {"allOf": [told, {"oneOf": [{"required": [IMAGE_PATHS]}, {"required": [shape.one_path]}]}]}
    return schema | told | {"properties": {**properties, **unused, **options_schema()}}


def cases_schema() -> dict[str, Any]:
    """The JSON Schema of a cases file; each line of a JSONL file is an entry."""
    options = options_schema()
    ours = {
        "title": "A case",
        "type": "object",
        "required": ["prompt"],
        "oneOf": [{"required": ["references"]}, {"required": [IMAGE_PATHS]}],
        "additionalProperties": False,
        "properties": {"prompt": TEXT, "references": {"$ref": "#/$defs/references"}, IMAGE_PATHS: PATHS, **options},
    }
    members = {"anyOf": [PATH, {"$ref": "#/$defs/references"}]}
    grid = {
        "title": "Every prompt with every set of references",
        "type": "object",
        "required": ["grid"],
        "additionalProperties": False,
        "properties": {
            "grid": {
                "type": "object",
                "required": ["prompts", "references"],
                "additionalProperties": False,
                "properties": {
                    "prompts": {"type": "array", "items": TEXT, "minItems": 1},
                    "references": {"type": "array", "items": members, "minItems": 1},
                },
            },
            **options,
        },
    }
    foreign = [foreign_schema(shape) for shape in SHAPES]
    entries = [{"$ref": "#/$defs/case"}, {"$ref": "#/$defs/grid"}, *foreign]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Cases of MOSAIC for FLUX",
        "anyOf": [{"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/entry"}}, {"$ref": "#/$defs/grid"}],
        "$defs": {"references": references_schema(), "case": ours, "grid": grid, "entry": {"anyOf": entries}},
    }


def schema_text() -> str:
    """What configs/cases.schema.json must hold."""
    return json.dumps(cases_schema(), indent=2, ensure_ascii=False) + "\n"


@command(NOTHING)
def main(argv: list[str] | None = None) -> None:
    """Write the file."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    write_schema(FILE, schema_text())
