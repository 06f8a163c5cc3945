"""Config files of construct.py and their schema."""

import json
from pathlib import Path

import jsonschema
import pytest

from preprocess.construct.config import load_construct_config
from scripts.schemas import config as schemas

CONFIGS = sorted(Path("configs").glob("construct_*.json"))


def test_the_schema_is_that_of_the_models() -> None:
    assert schemas.CONSTRUCT_FILE.read_text(encoding="utf-8") == schemas.construct_schema_text(), "run python scripts/make_config_schema.py"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_file_fits(path: Path) -> None:
    load_construct_config(path)
    given = json.loads(path.read_text(encoding="utf-8"))
    assert given["$schema"] == "construct.schema.json"
    jsonschema.validate(given, json.loads(schemas.CONSTRUCT_FILE.read_text(encoding="utf-8")))
