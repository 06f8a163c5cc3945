"""The settings file beside matching's results: what made them, and whether a new start may add to them."""

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import Any

from mosaic.data import Row
from mosaic.files import first_difference, read_json, write_text
from preprocess.extractors import ExtractorSpec
from preprocess.extractors.protocol import Extractor
from preprocess.matching.layouts import Layout
from preprocess.matching.settings import MatchingSettings


def run_settings(
    arguments: argparse.Namespace, settings: MatchingSettings, specs: Sequence[ExtractorSpec], extractors: Sequence[Extractor], device: str
) -> dict[str, Any]:
    """Everything that decides the results, as JSON values."""
    described = {
        spec.name: {**spec.options.model_dump(mode="json"), **extractor.provenance}
        for spec, extractor in zip(specs, extractors, strict=True)
    }
    order = [spec.name for spec in specs]
    return {
        "layout": arguments.layout,
        "matching": settings.model_dump(mode="json"),
        "order": order,
        "extractors": described,
        "device": device,
        "dtype": arguments.dtype,
    }


def claim_settings(layout: Layout, wanted: dict[str, Any], rows: Iterable[Row]) -> None:
    """Write the settings file, or check that the results there were made with the same settings. One process must come before the others.

    Raises:
        ValueError: Other settings made the results, or there are results without a settings file, which this command did not write.
    """
    path = layout.settings_path
    if not path.exists():
        foreign = next((row for row in rows if any(file.exists() for file in layout.files(row))), None)
        if foreign is not None:
            raise ValueError(
                f"{foreign.place}: has results already, but {path} is missing, so this command did not write them. "
                "Move them away, or name another folder with --output."
            )
        write_text(path, json.dumps(wanted, indent=2) + "\n")
        return
    found = read_json(path)
    if isinstance(found, dict) and isinstance(found.get("matching"), dict):  # settings that came later had their defaults
        found["matching"] = MatchingSettings().model_dump(mode="json") | found["matching"]
    difference = first_difference(found, wanted)
    if difference:
        raise ValueError(
            f"{path}: the results here were made with other settings: {difference}. "
            "Start with the same settings, move the results and this file away, or name another folder with --output."
        )
