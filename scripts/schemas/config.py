"""Writes configs/schema.json, the JSON Schema of config files, from the models of `mosaic.config.sections`.

And preprocess/mappings/schema.json, that of `convert.py`'s mapping files, from `preprocess.sources.mapping`, and
configs/construct.schema.json, that of `construct.py`'s config files, from `preprocess.construct.config`.

Editors that understand the "$schema" key of a file complete names, show what each setting means, and mark what is wrong.
"""

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

from mosaic.commands import NOTHING, command
from mosaic.config.loading import EXTENDS, Config
from mosaic.config.schema import Section
from mosaic.files import write_text
from preprocess.sources import mapping

FILE = ROOT / "configs" / "schema.json"
CONSTRUCT_FILE = ROOT / "configs" / "construct.schema.json"
MAPPING_FILE = mapping.FOLDER / "schema.json"
FOR_EDITORS: dict[str, Any] = {
    "$schema": {"type": "string", "description": "For editors; without effect."},
    "$comment": {"type": "string", "description": "For people; without effect."},
}


def config_schema(kind: type[Section] = Config, title: str = "Config of MOSAIC for FLUX") -> dict[str, Any]:
    """The JSON Schema of a config file: that of its settings, and the keys that a file may hold beside its sections."""
    schema = kind.model_json_schema()
    extends = {"type": "string", "description": "Config file, relative to this one, whose settings hold where this one gives none."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        **schema,
        "properties": FOR_EDITORS | {EXTENDS: extends} | schema["properties"],
    }


def schema_text() -> str:
    """What configs/schema.json must hold."""
    return json.dumps(config_schema(), indent=2, ensure_ascii=False) + "\n"


def construct_schema_text() -> str:
    """What configs/construct.schema.json must hold."""
    from preprocess.construct.config import ConstructConfig  # and torch, which a look at the help does without

    return json.dumps(config_schema(ConstructConfig, "Config of construct.py"), indent=2, ensure_ascii=False) + "\n"


def mapping_schema_text() -> str:
    """What preprocess/mappings/schema.json must hold."""
    schema = mapping.Mapping.model_json_schema()
    beside = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Mapping of a list's fields"}
    return json.dumps(beside | schema | {"properties": FOR_EDITORS | schema["properties"]}, indent=2, ensure_ascii=False) + "\n"


def write_schema(file: Path, text: str) -> None:
    """Write a generated file."""
    write_text(file, text)
    print(f"{file.relative_to(ROOT)}: written")


@command(NOTHING)
def main(argv: list[str] | None = None) -> None:
    """Write the files."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    write_schema(FILE, schema_text())
    write_schema(CONSTRUCT_FILE, construct_schema_text())
    write_schema(MAPPING_FILE, mapping_schema_text())
