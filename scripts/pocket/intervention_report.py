"""How much an adapter rests on what attention carries: the interventions over regimes and K, as tables and as numbers of a file."""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mosaic.config.loading import Config
from mosaic.files import write_text
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.weights.quantization import quantize_base
from scripts.pocket.evaluate import provenance
from scripts.pocket.evaluation import held_out_scenes
from scripts.pocket.interventions import INTERVENTIONS, NOISE_LEVELS, PLAIN, changes, measure_interventions
from scripts.pocket.statistics import over_seeds_and_scenes

REGIMES, KS = ("distinct", "twins"), (2, 4)  # unless others are asked for
Entries = Mapping[str, Mapping[str, Mapping[str, Any]]]  # by regime, K and name: an interval


def interval(values: Tensor) -> dict[str, float | None]:
    """Mean over scenes and its 95 % interval for other scenes; null where none is known."""
    estimate = over_seeds_and_scenes([values.tolist()])
    ends = {"mean": estimate.mean, "low": estimate.mean - estimate.half, "high": estimate.mean + estimate.half}
    return {name: None if math.isnan(value) else value for name, value in ends.items()}


def measure(config: Config, regimes: Sequence[str], ks: Sequence[int], num_cases: int, batch_size: int, seed: int) -> Entries:
    """The changes of L_diff at held-out scenes, `scripts.pocket.interventions.changes`, by regime and K."""
    pipeline = MosaicFluxPipeline.from_pretrained(config.model.pretrained, dtype=torch.float32)
    quantize_base(pipeline.transformer, config.inference.quantization or "none", torch.device("cpu"))
    pipeline.load_reference_lora(config.inference.lora, config.inference.lora_weight_name)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for regime, k in tqdm([(regime, k) for regime in regimes for k in ks], desc="interventions", unit="K"):
        losses = measure_interventions(pipeline, held_out_scenes(k, num_cases, regime), config, batch_size, seed)
        found.setdefault(regime, {})[str(k)] = {name: interval(values) for name, values in changes(losses).items()}
    return found


def cell(entry: Mapping[str, float | None], signed: bool = True) -> str:
    """Text such as "+16.5 [12.0, 21.0]", x 1,000."""
    mean, low, high = (math.nan if (value := entry[name]) is None else 1000 * value for name in ("mean", "low", "high"))
    text = f"{mean:+.1f}" if signed else f"{mean:.1f}"
    return text if math.isnan(low) else f"{text} [{low:.1f}, {high:.1f}]"


def table(entries: Entries) -> str:
    """Markdown table of L_diff and its changes over all noise, x 1,000, 95 % intervals in brackets."""
    columns = [(f"{regime}, K = {k}", found) for regime, of_k in entries.items() for k, found in of_k.items()]
    lines = ["| x 1,000 | " + " | ".join(title for title, _ in columns) + " |", "|" + "---|" * (len(columns) + 1)]
    lines.append("| L_diff | " + " | ".join(cell(found[PLAIN], signed=False) for _, found in columns) + " |")
    for name, intervention in INTERVENTIONS.items():
        lines.append(f"| {intervention.meaning} | " + " | ".join(cell(found[name]) for _, found in columns) + " |")
    return "\n".join(lines)


def noise_table(entries: Entries) -> str:
    """The same by thirds of noise, low / middle / high, without intervals."""
    columns = [(f"{regime}, K = {k}", found) for regime, of_k in entries.items() for k, found in of_k.items()]
    lines = [f"| x 1,000, {' / '.join(NOISE_LEVELS)} noise | " + " | ".join(title for title, _ in columns) + " |"]
    lines.append("|" + "---|" * (len(columns) + 1))
    for name, intervention in INTERVENTIONS.items():
        cells = [" / ".join(f"{1000 * found[f'{name}_{level}']['mean']:+.1f}" for level in NOISE_LEVELS) for _, found in columns]
        lines.append(f"| {intervention.meaning} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(config: Config, arguments: argparse.Namespace) -> None:
    """Measure, print the tables, and write the numbers where the command line says so."""
    found = provenance(config, arguments.seed) if arguments.output else {}
    entries = measure(config, arguments.regime or REGIMES, arguments.k or KS, arguments.num_cases, arguments.batch_size, arguments.seed)
    print(f"{table(entries)}\n\n{noise_table(entries)}")
    if arguments.output:
        write_text(arguments.output, json.dumps({**found, "interventions": entries}, indent=1, allow_nan=False) + "\n")
