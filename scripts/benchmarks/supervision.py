"""What supervising the target's queries costs a training step: the table of the command `supervision` of scripts/benchmark.py.

The settings of `loss` that read other rows than the paper's take turns, step by step and in changing order, on one model with random
weights. Only their ratios within a round are compared; on a CPU of the time that this process had, so that another one beside it matters
less.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from mosaic.config.loading import Config, from_dict
from mosaic.files import write_text
from mosaic.lora.adapter import reference_lora_parameters
from mosaic.planning.dry_run import StandInStep, build_transformer
from mosaic.planning.model_shape import FLUX_DEV_SHAPE, ModelShape
from scripts.benchmarks.infer import clocked
from scripts.benchmarks.train import WARM_UP_STEPS, model_shape, optimizer_step

PAPER = "reference (the paper)"
#: By name for tables, settings of `loss`; None: no rows are read at all.
ARMS: Mapping[str, dict[str, Any] | None] = {
    PAPER: {},
    "flow matching alone, no rows": None,
    "target": {"supervised_queries": "target"},
    "both": {"supervised_queries": "both"},
    "target, over the references' keys": {"supervised_queries": "target", "target_keys": "references"},
    "target, every head": {"supervised_queries": "target", "heads": "each"},
}
#: Between the pocket model and FLUX.1-dev, for a CPU: 64 + 256 + 4 x 256 tokens of width 512. Of blocks there are few, for all cost alike.
WIDE_SHAPE = ModelShape(
    {**FLUX_DEV_SHAPE.transformer, "num_layers": 1, "num_single_layers": 2, "num_attention_heads": 8, "attention_head_dim": 64}
    | {"joint_attention_dim": 512, "pooled_projection_dim": 512, "axes_dims_rope": [8, 28, 28]},
    FLUX_DEV_SHAPE.vae_scale_factor,
    {},
    is_local=False,
)
#: By model: side of target and reference in px, text tokens, batch size, rank.
SIZES = {"pocket": (64, 32, 24, 16, 32), "wide": (256, 256, 64, 1, 32), "flux_dev": (512, 512, 512, 1, 128)}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, return the result."""
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = measure(args, device)
    rows = [{"supervised": name, **compared(found, seconds[PAPER])} for name, found in seconds.items()]
    name = torch.cuda.get_device_name(0) if device == "cuda" else f"{args.threads} CPU threads"
    settings = {key: getattr(args, key) for key in ("model", "k", "max_points", "rounds")}
    result = {"device": name, "clock": clock_of(device), "settings": settings, "rows": rows}
    print_table(result)
    if args.output:
        write_text(args.output, json.dumps(result, indent=2) + "\n")
    return result


def clock_of(device: str) -> str:
    """What `clocked` measures on a device."""
    return "wall" if device == "cuda" else "cpu"


def config_of(args: argparse.Namespace, settings: Mapping[str, Any]) -> Config:
    """The config of an arm."""
    side, reference, text, batch_size, rank = SIZES[args.model]
    large = args.model == "flux_dev"
    return from_dict(
        {
            "model": {
                "dtype": "bfloat16" if large else "float32",
                "text_length": text,
                "gradient_checkpointing": "block" if large else "none",
            },
            "lora": {"rank": rank},
            "data": {"image_size": [side, side], "reference_size": reference},
            "loss": {"max_points": args.max_points, **settings},
            "training": {"batch_size": batch_size, "mixed_precision": "bf16" if large else "no"},
        }
    )


def measure(args: argparse.Namespace, device: str) -> dict[str, list[float]]:
    """Seconds of each round's step, by arm."""
    shape = WIDE_SHAPE if args.model == "wide" else model_shape(args.model)
    transformer = build_transformer(config_of(args, {}), shape, device)
    parameters = list(reference_lora_parameters(transformer).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    steps = {
        name: StandInStep(config_of(args, settings or {}), shape, args.k, transformer, supervised=settings is not None)
        for name, settings in ARMS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for turn in tqdm(range(WARM_UP_STEPS + args.rounds), desc="rounds", unit="round"):
        names = list(ARMS)
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            found = clocked(partial(optimizer_step, steps[name], parameters, optimizer), device, clock_of(device))
            if turn >= WARM_UP_STEPS:
                seconds[name].append(found)
    return seconds


def compared(seconds: Sequence[float], paper: Sequence[float]) -> dict[str, float]:
    """Median seconds of a step, and of the ratios to the paper's step of the same round the median and the quartiles."""
    ratios = [own / base for own, base in zip(seconds, paper, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {"seconds": statistics.median(seconds), "ratio": statistics.median(ratios), "low": low, "high": high}


def print_table(result: dict[str, Any]) -> None:
    """The result as a Markdown table."""
    settings, kind = result["settings"], {"cpu": "CPU seconds", "wall": "seconds"}[result["clock"]]
    print(
        f"Training steps of {settings['model']} on {result['device']}: K = {settings['k']}, {settings['max_points']} points, median of "
        f"{settings['rounds']} rounds, in brackets the quartiles of the ratio.\n"
    )
    print(f"| supervised queries | {kind} a step | to the paper's |\n|---|---:|---:|")
    for row in result["rows"]:
        print(f"| {row['supervised']} | {row['seconds']:.3g} | {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}] |")
