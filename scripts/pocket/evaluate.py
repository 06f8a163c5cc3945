"""The shipped pocket weights measured on held-out identities: one entry per K, and the tables of docs/pocket_world.md."""

import argparse
import datetime
import json
import math
from typing import Any

import torch
from tqdm import tqdm

from mosaic.config.loading import Config
from mosaic.files import write_text
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.weights.digests import weights_digest
from mosaic.weights.hub import resolve_lora_file
from mosaic.weights.quantization import quantize_base
from scripts.ablation.plan import WORLD_DIGEST, base_digest, judge_digest
from scripts.pocket import world
from scripts.pocket.evaluation import (
    MIN_VISIBLE,
    generate,
    held_out_scenes,
    judge_pictures,
    scene_attention_accuracy,
)
from scripts.pocket.judge import load_judge
from scripts.pocket.provenance import commit, hardware, versions

TABLED = ("identification", "leakage", "presence")  # with and without references
CAPTION = ("presence", "count", "background")  # what a base that reads its prompt draws right
HEADER = (
    "| K | cases | identification | without references | leakage | without references | class present | without references "
    "| attention exact (chance) | within one token (chance) | judge on real renderings |"
)


def evaluate(
    config: Config, ks: list[int], num_cases: int, batch_size: int, seed: int, attention_cases: int, device: torch.device | str = "cpu"
) -> list[dict]:
    """One entry per K: both arms, attention accuracy and the judge's own accuracy."""
    judge = load_judge()
    pipeline = MosaicFluxPipeline.from_pretrained(config.model.pretrained, dtype=torch.float32)
    quantize_base(pipeline.transformer, config.inference.quantization or "none", torch.device(device))
    pipeline.load_reference_lora(config.inference.lora, config.inference.lora_weight_name)
    pipeline.to(device).set_progress_bar_config(disable=True)
    entries = []
    for k in tqdm(ks, desc="K", unit="K"):
        scenes = held_out_scenes(k, num_cases)
        real = [world.render_scene(scene, config.inference.height).image for scene in scenes]
        arms = {
            name: judge_pictures(judge, generate(pipeline, scenes, config, with_references, batch_size, seed), scenes)
            for name, with_references in (("adapter", True), ("without_references", False))
        }
        accuracy = scene_attention_accuracy(pipeline, scenes[:attention_cases], config, batch_size, seed)
        entries.append(
            {
                "num_references": k,
                "num_cases": num_cases,
                **{name: result.to_dict() for name, result in arms.items()},
                "attention": {name: None if math.isnan(value) else value for name, value in accuracy._asdict().items()},
                "judge_on_real": judge_pictures(judge, real, scenes, MIN_VISIBLE).to_dict(),
            }
        )
    return entries


def provenance(config: Config, seed: int) -> dict[str, Any]:
    """What is measured and with what, for the file of the numbers.

    Raises:
        FileNotFoundError: There is no such adapter.
    """
    settings = config.inference
    if settings.lora is None:
        raise ValueError("inference.lora must name the adapter that is measured, got null.")
    lora = resolve_lora_file(settings.lora, settings.lora_weight_name)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "model": {"name": config.model.pretrained, "digest": base_digest(config.model.pretrained)},
        "lora": {"name": settings.lora, "digest": weights_digest(lora)},
        "judge_digest": judge_digest(),
        "world_digest": WORLD_DIGEST,
        "sampling": {
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "image_guidance_scale": settings.image_guidance_scale,
            "seed": seed,
        },
    }


def share_cell(entry: dict) -> str:
    """A share in percent with its interval; "-" where nothing was asked."""
    if not entry["count"]:
        return "-"
    return f"{100 * entry['share']:.1f} [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"


def table(entries: list[dict]) -> str:
    """Markdown table in percent, 95 % intervals in brackets."""
    lines = [HEADER, "|" + "---|" * (HEADER.count("|") - 1)]
    for entry in entries:
        cells = [str(entry["num_references"]), str(entry["num_cases"])]
        for measure in TABLED:
            cells += [share_cell(entry["adapter"][measure]), share_cell(entry["without_references"][measure])]
        attention = entry["attention"]
        cells += [f"{100 * attention[name]:.1f} ({100 * attention[name + '_chance']:.1f})" for name in ("exact", "near")]
        cells.append(share_cell(entry["judge_on_real"]["identification"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def caption_table(entries: list[dict]) -> str:
    """Markdown table of what the base draws of its caption without references, and how well the judge sees it on real renderings."""
    titles = ("class present", "count right", "background right")
    header = "| K | " + " | ".join(f"{title} | judge on real renderings" for title in titles) + " |"
    lines = [header, "|" + "---|" * (header.count("|") - 1)]
    for entry in entries:
        cells = [share_cell(entry[arm][measure]) for measure in CAPTION for arm in ("without_references", "judge_on_real")]
        lines.append("| " + " | ".join([str(entry["num_references"]), *cells]) + " |")
    return "\n".join(lines)


def run(config: Config, arguments: argparse.Namespace) -> None:
    """Measure, print the tables, and write the numbers where the command line says so."""
    found = provenance(config, arguments.seed) if arguments.output else {}
    ks = arguments.k or [1, 2, 3, 4]
    entries = evaluate(config, ks, arguments.num_cases, arguments.batch_size, arguments.seed, min(arguments.num_cases, 100))
    print(f"{table(entries)}\n\nThe base alone, without references:\n\n{caption_table(entries)}")
    if arguments.output:
        write_text(arguments.output, json.dumps(found | {"entries": entries}, indent=1, allow_nan=False) + "\n")
