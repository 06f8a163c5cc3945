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


def test_overrides_and_extending_files_reach_settings_within_settings(tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text(json.dumps({"points": {"limits": {"min_points": 3, "min_cyclic": 0.1}}}))
    (tmp_path / "own.json").write_text(json.dumps({"extends": "base.json", "points": {"target_cells": 8, "limits": {"min_cyclic": 0.2}}}))
    points = load_construct_config(tmp_path / "own.json", ["points.limits.min_points=5", "seed=7"]).points
    assert (points.target_cells, points.limits.min_points, points.limits.min_cyclic) == (8, 5, 0.2)
    assert load_construct_config(tmp_path / "own.json", ["seed=7"]).seed == 7
