"""The presets: each differs from the one it extends in the stated settings and in nothing else, and none repeats an inherited value."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mosaic.config.loading import load_config, resolved_dict
from scripts.schemas import config as make_config_schema

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRESETS = {
    "mosaic_1024.json": (
        "mosaic_512.json",
        {
            "data.root": "data/multi_reference_1024",
            "data.image_size": [1024, 1024],
            "data.buckets": [[1024, 1024], [896, 1152], [1152, 896], [832, 1216], [1216, 832], [768, 1344], [1344, 768]],
            "training.output_dir": "outputs/mosaic_1024",
        },
    ),
    "mosaic_24gb.json": (
        "mosaic_512.json",
        {
            "model.quantization": "nf4",
            "data.latent_cache": "data/latent_cache_512",
            "data.text_cache": "data/text_cache",
            "optimizer.name": "adamw_8bit",
            "training.output_dir": "outputs/mosaic_24gb",
            "validation.every": None,
        },
    ),
    "mosaic_isolated.json": (
        "mosaic_512.json",
        {"model.reference_attention": "isolated", "training.output_dir": "outputs/mosaic_isolated"},
    ),
    "release_512.json": (
        "mosaic_512.json",
        {
            "lora.rank": 512,
            "loss.preset": "release",
            "loss.correspondence_weight": 0.1,
            "loss.disentanglement_weight": 1.0,
            "loss.correspondence_reduction": "point",
            "loss.disentanglement_rows": "all",
            "loss.divergence": "jensen_shannon",
            "loss.disentanglement_start_step": 10_000,
            "loss.disentanglement_warmup_steps": 1_000,
            "loss.capture_blocks": "double",
            "optimizer.learning_rate": 8e-5,
            "optimizer.ema_decay": 0.99,
            "training.max_steps": None,
            "training.max_epochs": 10,
            "training.output_dir": "outputs/release_512",
        },
    ),
}


def flat(name: str) -> dict[str, Any]:
    """All settings of a config by dotted path."""
    values = resolved_dict(load_config(CONFIGS / name))
    return {f"{section}.{field}": value for section, fields in values.items() for field, value in fields.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_differs_from_its_parent_exactly_where_stated(name: str) -> None:
    parent, stated = PRESETS[name]
    given = json.loads((CONFIGS / name).read_text())
    jsonschema.validate(given, make_config_schema.config_schema())
    assert (given["$schema"], given["extends"]) == ("schema.json", parent)
    inherited, found = flat(parent), flat(name)
    assert {path: value for path, value in found.items() if value != inherited[path]} == stated
    written = {f"{section}.{field}" for section, fields in given.items() if isinstance(fields, dict) for field in fields}
    assert written <= set(stated)


def test_every_preset_that_extends_is_listed_here() -> None:
    extending = {path.name for path in CONFIGS.glob("*.json") if "extends" in json.loads(path.read_text())}
    assert extending == set(PRESETS)


def test_buckets_at_1024_have_about_its_area_and_fit_the_tokens() -> None:
    data = load_config(CONFIGS / "mosaic_1024.json").data
    assert data.reference_size == 512
    assert data.image_size in data.buckets
    for height, width in data.buckets:
        assert height % 16 == width % 16 == 0
        assert 0.96 <= height * width / 1024**2 <= 1
        assert (width, height) in data.buckets


# ---- docs/training.md


GUIDE = (CONFIGS.parent / "docs/training.md").read_text(encoding="utf-8")


def test_the_guide_names_every_preset_and_accelerate_config_and_every_logged_name() -> None:
    files = [path.name for path in CONFIGS.glob("*.json") if "schema" not in path.name and not path.name.startswith("construct_")]
    assert [name for name in files if f"`{name}`" not in GUIDE] == []
    assert [path.name for path in (CONFIGS / "accelerate").iterdir() if f"`accelerate/{path.name}`" not in GUIDE] == []
    names = re.findall(
        r'"((?:throughput|memory|optimizer)/\w+)"',
        "".join((CONFIGS.parent / f"mosaic/training/{n}.py").read_text() for n in ("watch/throughput", "trainer")),
    )
    assert len(names) >= 9
    assert [name for name in names if f"`{name}`" not in GUIDE] == []
