"""The published ablation: what the guide, the report and the adapters say is in its results file."""

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageStat

from mosaic.config.loading import from_dict
from mosaic.lora.files import LoraFile, reference_metadata
from scripts.ablation.arms import ARMS_FOLDER
from scripts.ablation.figures import draw
from scripts.ablation.plan import ROOT
from scripts.ablation.readme import MARKER, block
from scripts.ablation.results import read_results
from scripts.ablation_check import RESULTS

NUMBER = re.compile(r"\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return read_results(RESULTS)


def test_it_is_the_finished_long_form(results: dict[str, Any]) -> None:
    assert results["complete"]
    assert results["size"]["name"] == "long"
    assert results["size"]["seeds"] >= 3
    assert {run["status"] for run in results["runs"]} == {"finished"}


def test_the_guide_holds_its_tables(results: dict[str, Any]) -> None:
    before, inside, after = (ROOT / "docs/ablation.md").read_text(encoding="utf-8").split(MARKER)
    assert inside.strip() == block(results, "../assets/ablation")
    by_hand = " ".join((before + after).split())
    intervals = re.findall(r"-?[\d.]+ \[-?[\d.]+, -?[\d.]+\]", by_hand)
    assert len(intervals) >= 3
    assert [interval for interval in intervals if interval not in inside] == []
    assert after


def test_the_report_is_drawn_from_it(tmp_path: Path) -> None:
    """The same words and, but for rounding, numbers and pixels: fonts and encoders differ over the versions of Pillow."""
    draw(RESULTS, tmp_path)
    for drawn in tmp_path.iterdir():
        published = RESULTS.parent / drawn.name
        if drawn.suffix == ".png":
            with Image.open(drawn) as picture, Image.open(published) as published_picture:
                assert picture.size == published_picture.size
                difference = ImageChops.difference(picture.convert("RGB"), published_picture.convert("RGB"))
            assert max(ImageStat.Stat(difference).mean) < 2, drawn.name
            continue
        text, published_text = (path.read_text(encoding="utf-8") for path in (drawn, published))
        if drawn.suffix == ".md":
            assert text == published_text
            continue
        words, numbers = NUMBER.sub("", text), [float(number) for number in NUMBER.findall(text)]
        assert words == NUMBER.sub("", published_text), drawn.name
        assert numbers == pytest.approx([float(number) for number in NUMBER.findall(published_text)], abs=0.11), drawn.name  # px


def test_the_adapters_of_its_main_arms_ship(results: dict[str, Any]) -> None:
    runs = {run["arm"]: run for run in results["runs"] if "main" in run["parts"] and run["seed"] == 0 and run["steps"]}
    assert {path.stem for path in ARMS_FOLDER.glob("*.safetensors")} == set(runs)
    for name, run in runs.items():
        file = LoraFile(ARMS_FOLDER / f"{name}.safetensors", "adapter of the ablation")
        config = from_dict(reference_metadata(file.metadata, str(file.path))["config"], str(file.path))
        found = {setting: getattr(getattr(config, setting.split(".")[0]), setting.split(".")[1]) for setting in run["settings"]}
        assert found == run["settings"], name
