"""The shipped pocket weights measured on scenes of a regime: numbers per regime and K, and their table."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mosaic.config.loading import Config
from mosaic.files import without_nan, write_text
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.weights.quantization import quantize_base
from scripts.pocket import world
from scripts.pocket.deciding import measure_settling
from scripts.pocket.evaluate import provenance
from scripts.pocket.evaluation import generate, held_out_scenes
from scripts.pocket.judge import load_judge
from scripts.pocket.regimes import RegimeOutcome, estimate, judge_regime

HEADER = (
    "| regime | K | cases | apart | same look | identification | blending | missing | doubled "
    "| judge on real renderings: apart | identification |"
)
JUDGED = ("apart", "identification")  # of the real renderings, in the table


def evaluate_regimes(
    config: Config,
    wanted: dict[str, list[int]],
    num_cases: int,
    batch_size: int,
    seed: int,
    settling: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """By regime and K, in percent, the measures of generated pictures and, under "real_renderings", of the scenes as drawn.

    Args:
        config: Model, adapter and sampling.
        wanted: By regime the numbers of references.
        num_cases: Held-out scenes of each.
        batch_size: Pictures per call.
        seed: Of the start noise.
        settling: Whether to measure too, sampling again, when places settle on references (`deciding.Settling`).
        device: That of the pipeline.
    """
    judge = load_judge()
    pipeline = MosaicFluxPipeline.from_pretrained(config.model.pretrained, dtype=torch.float32)
    quantize_base(pipeline.transformer, config.inference.quantization or "none", torch.device(device))
    pipeline.load_reference_lora(config.inference.lora, config.inference.lora_weight_name)
    pipeline.to(device).set_progress_bar_config(disable=True)
    found: dict[str, Any] = {regime: {} for regime in wanted}
    for regime, k in tqdm([(regime, k) for regime, ks in wanted.items() for k in ks], desc="regimes", unit="K"):
        scenes = held_out_scenes(k, num_cases, regime)
        real = [world.render_scene(scene, config.data.image_size[0]).image for scene in scenes]
        pictures = generate(pipeline, scenes, config, True, batch_size, seed)
        found[regime][str(k)] = {
            "num_cases": num_cases,
            **percentages(judge_regime(judge, pictures, scenes)),
            "real_renderings": percentages(judge_regime(judge, real, scenes)),
        }
        if settling:
            steps = measure_settling(pipeline, judge, scenes, config, seed)
            found[regime][str(k)]["settling"] = [
                without_nan({**step._asdict(), "settled": 100 * step.settled, "as_drawn": 100 * step.as_drawn}) for step in steps
            ]
    return found


def percentages(outcomes: list[RegimeOutcome]) -> dict[str, Any]:
    """Means over scenes in percent, beside them their 95 % intervals over scenes; null where there is nothing to speak of."""
    means: dict[str, Any] = {}
    intervals: dict[str, list[float] | None] = {}
    for name in RegimeOutcome._fields:
        value = estimate([outcomes], name)
        means[name] = None if math.isnan(value.mean) else 100 * value.mean
        ends = [100 * max(value.mean - value.half, 0.0), 100 * min(value.mean + value.half, 1.0)]
        intervals[name] = None if math.isnan(value.half) else ends
    return {**means, "intervals": intervals}


def cell(entry: dict[str, Any], measure: str) -> str:
    """A share in percent with its interval, where it has one; "-" where nothing was asked."""
    if entry[measure] is None:
        return "-"
    ends = entry["intervals"][measure]
    return f"{entry[measure]:.1f}" + (f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else "")


def regime_table(found: dict[str, Any]) -> str:
    """Markdown table in percent, 95 % intervals in brackets."""
    lines = [HEADER, "|" + "---|" * (HEADER.count("|") - 1)]
    for regime, entries in found.items():
        for k, entry in entries.items():
            cells = [cell(entry, measure) for measure in RegimeOutcome._fields]
            cells += [cell(entry["real_renderings"], measure) for measure in JUDGED]
            lines.append("| " + " | ".join([regime, k, str(entry["num_cases"]), *cells]) + " |")
    return "\n".join(lines)


def adapter_tables(adapters: list[dict[str, Any]]) -> list[str]:
    """Markdown tables, one per regime and K, of adapters side by side; their rows are named by their files, the last one is the judge's."""
    tables = []
    for regime, entries in adapters[0]["regimes"].items():
        for k, entry in entries.items():
            rows = [(Path(adapter["lora"]["name"]).stem, adapter["regimes"][regime][k]) for adapter in adapters]
            rows.append(("*real renderings*", entry["real_renderings"]))
            header = [f"{regime}, K = {k}", *(name.replace("_", " ") for name in RegimeOutcome._fields)]
            lines = [header, ["---"] * len(header), *([name, *(cell(row, m) for m in RegimeOutcome._fields)] for name, row in rows)]
            tables.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return tables


def settling_tables(found: dict[str, Any]) -> list[str]:
    """Markdown tables of the regimes and K whose settling was measured: shares in percent, contrasts in nats."""
    tables = []
    for regime, entries in found.items():
        for k, entry in entries.items():
            rows = [
                [
                    "-" if value is None else f"{value:.1f}" if name in ("settled", "as_drawn") else f"{value:.2f}"
                    for name, value in step.items()
                ]
                for step in entry.get("settling", [])
            ]
            header = [f"{regime}, K = {k}: timestep", "settled", "as drawn", "contrast", "contrast with one look"]
            if rows:
                tables.append("\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]))
    return tables


def run(config: Config, arguments: argparse.Namespace) -> None:
    """Measure, print the tables, and write the numbers where the command line says so; equal arguments give an equal file."""
    configs = [config.replace(inference=config.inference.replace(lora=name)) for name in arguments.lora or [config.inference.lora]]
    origins = [provenance(of_adapter, arguments.seed) for of_adapter in configs]  # an adapter that is missing is known before any work
    wanted = {name: sorted(set(arguments.k or (k for k in (2, 3, 4) if k >= world.REGIMES[name]))) for name in arguments.regime}
    adapters = []
    for of_adapter, origin in zip(configs, origins, strict=True):
        found = evaluate_regimes(of_adapter, wanted, arguments.num_cases, arguments.batch_size, arguments.seed, arguments.settling)
        print("\n\n".join([regime_table(found), *settling_tables(found)]))
        adapters.append({"lora": origin.pop("lora"), "regimes": found})
    numbers = {name: value for name, value in origins[0].items() if name != "date"}
    if len(adapters) > 1:
        print("\n" + "\n\n".join(adapter_tables(adapters)))
    if arguments.output:
        measured = adapters[0] if len(adapters) == 1 else {"adapters": adapters}
        write_text(arguments.output, json.dumps(numbers | measured, indent=1, allow_nan=False) + "\n")
