"""FLUX.1-dev's shape on a GPU in at most eight minutes: the command `gpu` of scripts/benchmark.py.

Random weights. Training steps and sampling at 512 and at 1024 px, of each number format of the base. The JSON is written after every cell;
one that would end too late, by the longest of its kind so far, is left out and named. `--model thin` does the same on a CPU, to try it.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from mosaic.files import write_text
from scripts.benchmarks import infer, train
from scripts.benchmarks.measuring import device_name, product_tflops
from scripts.benchmarks.models import MODELS, measured_model

Rows = list[dict[str, Any]]

FORMATS = ("none", "fp8_dynamic")  # of model.quantization
TRAIN_REFERENCES, INFER_REFERENCES = (4, 2), (4,)
TRAIN_FLAGS = ("--steps", "5", "--no-twin")
INFER_FLAGS = ("--steps", "6", "--runs", "2", "--modes", "target", "isolated", "isolated-cache", "--no-twin")
FIRST_CELL_SECONDS = 60.0  # of a kind of which none was measured yet


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what there is time for, print the tables, return the result.

    Raises:
        ValueError: FLUX.1-dev's shape, and no GPU that it fits.
    """
    begin = time.perf_counter()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if MODELS[args.model].half else torch.float32
    result: dict[str, Any] = {
        "model": args.model,
        "device": device_name(device, 1),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "product_tflops": product_tflops(device, dtype),
        "left out": [],
        "train": [],
        "infer": [],
    }
    longest: dict[str, float] = {}
    for kind, name, measure in cells(args.model, device):
        start = time.perf_counter()
        if start - begin + longest.get(kind, FIRST_CELL_SECONDS) > 60 * args.minutes:
            result["left out"].append(f"{kind} {name}")
            continue
        result[kind] += [{"format": name.split()[0], **row} for row in measure()]
        gc.collect()
        longest[kind] = max(longest.get(kind, 0.0), time.perf_counter() - start)
        result["seconds"] = time.perf_counter() - begin
        print(f"{result['seconds']:5.0f} s  {kind} {name}", flush=True)
        write_text(args.output, json.dumps(result, indent=2) + "\n")
    write_text(args.output, json.dumps(result, indent=2) + "\n")
    print(f"\n{table(result)}")
    return result


def cells(model: str, device: str) -> Iterator[tuple[str, str, Callable[[], Rows]]]:
    """Kind, name and measurement of every cell: small pictures first, number formats in turns."""
    for size in (MODELS[model].size, 2 * MODELS[model].size):
        for format_ in FORMATS:
            for k in TRAIN_REFERENCES:
                yield "train", f"{format_} {size} px, K = {k}", partial(train_rows, model, format_, size, k, device)
            for k in INFER_REFERENCES:
                yield "infer", f"{format_} {size} px, K = {k}", partial(infer_rows, model, format_, size, k, device)


def train_rows(model: str, format_: str, size: int, num_references: int, device: str) -> Rows:
    """A row without recomputation; where that does not fit, one more with it."""
    args = _flags("train", model, TRAIN_FLAGS, size, num_references)
    train.check_room(args)
    rate, peak = train.rates(args, device, torch.bfloat16 if MODELS[model].half else torch.float32)
    rows: Rows = []
    for mode in ("none", "block"):
        found = train.measure(args, train.model_of(args, size), num_references, mode, device, peak, rate, format_)
        rows.append({"px": size, "K": num_references, "checkpointing": mode} | found)
        if found["s/step"] is not None:
            break
    return rows


def infer_rows(model: str, format_: str, size: int, num_references: int, device: str) -> Rows:
    """The rows of all modes."""
    args = _flags("infer", model, INFER_FLAGS, size, num_references)
    pipeline = infer.random_pipeline(measured_model(model), torch.device(device), format_)
    pipeline.set_progress_bar_config(disable=True)
    rate, peak = train.rates(args, device, pipeline.transformer.dtype)
    modes = [infer.parse_mode(text) for text in args.modes]
    return infer.measure_cell(infer.Cell(args, pipeline.to(device), size, num_references, 1), modes, peak, rate)


def _flags(kind: str, model: str, flags: tuple[str, ...], size: int, num_references: int) -> argparse.Namespace:
    """The arguments of a cell: the defaults of `train` and `infer`, but for these flags."""
    from scripts.benchmarks.command import parse

    return parse([kind, "--model", model, "--sizes", str(size), "--k", str(num_references), *flags])


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    parts = [
        f"{result['model']}, random weights, {result['device']}, torch {result['torch']}, {result['date']}; a large product: "
        f"{result['product_tflops']:.4g} TFLOP/s."
    ]
    columns = {
        "train": ("format", "px", "K", "checkpointing", "s/step", "peak GiB", "TFLOP", "MFU %", "of product %", "capture and losses %"),
        "infer": ("format", "px", "K", "mode", "first s", "s/step", "peak GiB", "of product %", "over plain", "predicted over plain"),
    }
    for kind, names in columns.items():
        lines = ["| " + " | ".join(names) + " |", "|" + "---|" * 4 + "---:|" * (len(names) - 4)]
        lines += ["| " + " | ".join(train.shown(row[name], row["s/step"] is not None) for name in names) + " |" for row in result[kind]]
        parts.append("\n".join(lines))
    if result["left out"]:
        parts.append(f"Left out for want of time: {'; '.join(result['left out'])}.")
    return "\n\n".join(parts)
