"""The published ablation: what the guide, the report and the adapters say is in its results file."""

import re
from typing import Any

import pytest

from mosaic.config.loading import from_dict
from mosaic.files import read_json
from mosaic.lora.files import LoraFile, reference_metadata
from scripts.ablation.arms import ARMS_FOLDER
from scripts.ablation.plan import ROOT
from scripts.ablation_check import RESULTS


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return read_json(RESULTS)


def test_it_is_the_finished_long_form(results: dict[str, Any]) -> None:
    assert results["complete"]
    assert results["size"]["name"] == "long"
    assert results["size"]["seeds"] >= 3
    assert {run["status"] for run in results["runs"]} == {"finished"}


def test_the_guide_shows_what_was_drawn_of_it(results: dict[str, Any]) -> None:
    """By the commit of that time: its main numbers, and figures that are there."""
    guide = (ROOT / "docs/ablation.md").read_text(encoding="utf-8")
    for run in results["runs"]:
        if "main" in run["parts"]:
            assert f"| {run['meaning']} |" in guide
    figures = re.findall(r"\]\(\.\./assets/ablation/([^)]+)\)", guide)
    assert len(figures) == 5
    assert all((RESULTS.parent / figure).is_file() for figure in figures)


def test_the_adapters_of_its_main_arms_ship(results: dict[str, Any]) -> None:
    runs = {run["arm"]: run for run in results["runs"] if "main" in run["parts"] and run["seed"] == 0 and run["steps"]}
    assert {path.stem for path in ARMS_FOLDER.glob("*.safetensors")} == set(runs)
    for name, run in runs.items():
        file = LoraFile(ARMS_FOLDER / f"{name}.safetensors", "adapter of the ablation")
        config = from_dict(reference_metadata(file.metadata, str(file.path))["config"], str(file.path))
        found = {setting: getattr(getattr(config, setting.split(".")[0]), setting.split(".")[1]) for setting in run["settings"]}
        assert found == run["settings"], name
