"""Settings of an extractor one after the other, each measured by itself."""

import argparse
import itertools
from collections.abc import Mapping
from typing import Any

from preprocess.extractors import ExtractorSpec, extractor_spec
from preprocess.extractors.arguments import assigned_options, json_value
from preprocess.matching.metrics import ALPHAS

FILTER = "cycle within 2"
"""Whose precision and recall are told."""


def swept_specs(arguments: argparse.Namespace) -> dict[str, ExtractorSpec]:
    """The extractors asked for, checked but not built, with every combination of the values of --sweep, by what tells them apart.

    Raises:
        ValueError: As `extractor_specs`, or an option has no value.
    """
    fixed = assigned_options(arguments.extractors, arguments.set, "--set")
    swept = assigned_options(arguments.extractors, arguments.sweep, "--sweep")
    specs = {}
    for name, texts in swept.items():
        own = {option: json_value(text) for option, text in fixed[name].items()}
        for values in itertools.product(*(text.split(",") for text in texts.values())):
            chosen = dict(zip(texts, values, strict=True))
            label = " ".join([name, *(f"{option}={value}" for option, value in chosen.items())])
            specs[label] = extractor_spec(name, own | {option: json_value(value) for option, value in chosen.items()})
    return specs


def sweep_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown table, in percent but for the figures, of what `evaluate` says of each setting alone, by its label."""
    head = [*(f"PCK@{alpha:g}" for alpha in ALPHAS), f"{FILTER}: precision", "recall", "cyclic", "coherence"]
    lines = [f"| extractor | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for label, result in results.items():
        points = next(entry for entry in result["pck"] if not entry["soft_argmax"])["per_point"]
        left = next(entry for entry in result["filters"] if entry["filter"] == FILTER)
        told = {entry["points"]: entry for entry in result["figures"]}
        cells = [f"{100 * share:.1f}" for share in (*points.values(), left["precision"], left["recall"])]
        figures = [told.get(label, {}).get("cyclic"), told.get(f"{label}, {FILTER}", {}).get("coherence")]
        cells += ["" if figure is None else f"{figure[0]:.2f}" for figure in figures]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)
