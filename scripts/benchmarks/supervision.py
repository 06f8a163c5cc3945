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

from mosaic.files import write_text
from mosaic.lora.adapter import reference_lora_parameters
from mosaic.planning.dry_run import StandInStep
from scripts.benchmarks.measuring import WARM_UP_STEPS, device_name, optimizer_step, timed
from scripts.benchmarks.models import measured_model

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


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, return the result."""
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = measure(args, device)
    rows = [{"supervised": name, **compared(found, seconds[PAPER])} for name, found in seconds.items()]
    settings = {key: getattr(args, key) for key in ("model", "k", "max_points", "rounds")}
    name, clock = device_name(device, args.threads), "cpu" if device == "cpu" else "wall"
    result = {"device": name, "clock": clock, "settings": settings, "rows": rows}
    print_table(result)
    if args.output:
        write_text(args.output, json.dumps(result, indent=2) + "\n")
    return result


def measure(args: argparse.Namespace, device: str) -> dict[str, list[float]]:
    """Seconds of each round's step, by arm."""
    model = measured_model(args.model)
    checkpointing = "block" if model.half else "none"
    points = {"max_points": args.max_points}
    configs = {name: model.config(args.k, checkpointing, loss=points | (settings or {})) for name, settings in ARMS.items()}
    transformer = model.build(configs[PAPER], device)
    parameters = list(reference_lora_parameters(transformer).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    steps = {
        name: StandInStep(configs[name], model.shape, args.k, transformer, supervised=settings is not None)
        for name, settings in ARMS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for turn in tqdm(range(WARM_UP_STEPS + args.rounds), desc="rounds", unit="round"):
        names = list(ARMS)
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            found = timed(partial(optimizer_step, steps[name], parameters, optimizer), device)
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
