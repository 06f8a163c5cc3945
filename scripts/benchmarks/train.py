"""Training steps over K x resolution x gradient checkpointing: the table of the command `train` of scripts/benchmark.py.

Each cell runs the real forward pass, losses, backward pass, clipping and AdamW on a model with random weights. Beside the step's time stand
what bounds it from below (the FLOP model at the rate of a large matrix product on this device), the share of captured rows and losses, and
on a CPU the naive twin, which takes turns with ours.
"""

import argparse
import gc
import json
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mosaic.config.loading import Config
from mosaic.files import write_text
from mosaic.lora.adapter import reference_lora_parameters
from mosaic.model.costs import lora_parameter_count
from mosaic.planning.dry_run import StandInStep
from mosaic.planning.memory_model import FORMAT_BYTES, GIB
from mosaic.planning.preflight import ASSUMED_PEAK_TFLOPS, find_device, step_tflop
from mosaic.training.watch.throughput import known_peak
from mosaic.weights.numbers import without_tiny_numbers
from scripts.benchmarks.measuring import WARM_UP_STEPS, device_name, optimizer_step, peak_bytes, product_tflops, timed
from scripts.benchmarks.models import MeasuredModel, measured_model
from scripts.benchmarks.twin import Twin, check_agreement

COLUMNS = (
    *("px", "K", "checkpointing", "s/step", "peak GiB", "above the model GiB", "TFLOP", "MFU %", "floor s", "of product %"),
    *("capture and losses %", "x twin", "x twin's memory"),
)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every cell, print the table, return the result.

    Raises:
        ValueError: If the model cannot fit this machine.
    """
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_room(args)
    rate, peak = rates(args, device, torch.bfloat16 if model_of(args).half else torch.float32)
    cells = [(size, k, mode) for size in args.sizes for k in args.references for mode in args.checkpointing]
    rows = []
    for size, k, mode in tqdm(cells, desc="cells", unit="cell"):
        with without_tiny_numbers():  # as training has it
            found = measure(args, model_of(args, size), k, mode, device, peak, rate)
        rows.append({"px": size, "K": k, "checkpointing": mode} | found)
    result = {
        "model": args.model,
        "device": device_name(device, args.threads),
        "clock": "device" if device == "cuda" else args.clock,
        "product_tflops": rate,
        "peak_tflops": peak,
        "rank": args.rank,
        "rows": rows,
    }
    print_table(args, result)
    if args.output:
        write_text(args.output, json.dumps(result, indent=2) + "\n")
    return result


def rates(args: argparse.Namespace, device: str, dtype: torch.dtype) -> tuple[float, float]:
    """TFLOP/s of a large matrix product here, and those that a utilisation is measured by: on a CPU the same."""
    rate = product_tflops(device, dtype, args.clock)
    return rate, args.peak_tflops or known_peak(torch.device(device)) or (ASSUMED_PEAK_TFLOPS if device == "cuda" else rate)


def model_of(args: argparse.Namespace, size: int | None = None) -> MeasuredModel:
    """The model that is measured, at the sizes of the command line."""
    names = ("reference_size", "text_tokens", "batch_size", "rank", "points_per_reference")
    return measured_model(args.model, size=size, **{name: getattr(args, name, None) for name in names})


def check_room(args: argparse.Namespace) -> None:
    """Refuse a model whose weights and optimizer state alone leave no room.

    Raises:
        ValueError: With the numbers, and the other way to measure.
    """
    model = model_of(args)
    config = model.config(1)
    device = find_device(config, None)
    shape = model.shape
    needed = shape.base_parameters * FORMAT_BYTES[config.model.dtype] + 16 * lora_parameter_count(shape.transformer, model.rank)
    if device.memory is not None and needed > device.memory:
        raise ValueError(
            f"--model {args.model} needs {needed / GIB:.1f} GiB for weights, gradients and optimizer state alone, but {device.name} have "
            f"{device.memory / GIB:.1f} GiB. Use --model pocket here, or a GPU of 80 GB."
        )


def measure(
    args: argparse.Namespace,
    model: MeasuredModel,
    num_references: int,
    mode: str,
    device: str,
    peak: float,
    rate: float,
    quantization: str = "none",
) -> dict[str, Any]:
    """One cell; where memory runs out on the way, its numbers are None."""
    config = model.config(num_references, mode, quantization)
    needed, useful = (step_tflop(config, model.shape, num_references, name) for name in (mode, "none"))
    row: dict[str, Any] = {"TFLOP": needed, "floor s": needed / rate}
    try:
        seconds, memory, weights = _measured(args, config, model, num_references, device)
    except torch.OutOfMemoryError:
        return row | {column: None for column in COLUMNS[3:] if column not in row}
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    median = statistics.median(seconds["ours"])
    share = statistics.median(100 * (whole - part) / whole for whole, part in zip(seconds["ours"], seconds["bare"], strict=True))
    return row | {
        "s/step": median,
        "peak GiB": memory["ours"] / GIB,
        "above the model GiB": (memory["ours"] - weights) / GIB,
        "MFU %": 100 * useful / (median * peak),
        "of product %": 100 * row["floor s"] / median,
        "capture and losses %": share,
        "x twin": statistics.median(seconds["twin"]) / median if "twin" in seconds else None,
        "x twin's memory": (memory["twin"] - weights) / (memory["ours"] - weights) if "twin" in memory else None,
    }


def _measured(
    args: argparse.Namespace, config: Config, model: MeasuredModel, num_references: int, device: str
) -> tuple[dict[str, list[float]], dict[str, int], int]:
    """Seconds of each step of each arm, in turns; the peak of ours and of the twin in bytes; the bytes of the model.

    Arms: ours; bare, the same without captured rows and the losses on them; where nothing is recomputed on a CPU, the twin.
    """
    transformer = model.build(config, device)
    arms = {"ours": StandInStep(config, model.shape, num_references, transformer)}
    arms["bare"] = StandInStep(config, model.shape, num_references, transformer, supervised=False)
    parameters: dict[str, Sequence[Tensor]] = {"ours": list(reference_lora_parameters(transformer).values())}
    given = {"ours": [*transformer.parameters(), *transformer.buffers()]}
    if args.twin and device == "cpu" and config.model.gradient_checkpointing == "none":
        twin = Twin(transformer)
        arms["twin"] = StandInStep(config, model.shape, num_references, transformer, forward=twin)
        parameters["twin"], given["twin"] = twin.parameters, twin.tensors
    optimizers = {name: torch.optim.AdamW(values, lr=1e-4) for name, values in parameters.items()}
    parameters["bare"], optimizers["bare"] = parameters["ours"], optimizers["ours"]
    steps = {name: partial(optimizer_step, arms[name], parameters[name], optimizers[name]) for name in arms}
    if "twin" in arms:
        torch.manual_seed(0)
        ours = arms["ours"]().detach()
        torch.manual_seed(0)
        check_agreement(ours, arms["twin"]().detach())
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for index in range(WARM_UP_STEPS + args.steps):
        first = index % len(names)  # who runs after whom matters to caches and to the allocator
        for name in (*names[first:], *names[:first]):
            own = timed(steps[name], device, args.clock)
            if index >= WARM_UP_STEPS:
                seconds[name].append(own)
    memory = {}
    for name in given:
        state = [value for values in optimizers[name].state.values() for value in values.values() if isinstance(value, Tensor)]
        memory[name] = peak_bytes(steps[name], [*given[name], *state], device)
    weights = sum(tensor.nbytes for tensor in given["ours"])
    return seconds, memory, weights


def print_table(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """The result as a Markdown table."""
    print(
        f"Training steps of {result['model']} on {result['device']} ({result['clock']} time): rank {args.rank}, batch {args.batch_size}, "
        f"{args.points_per_reference} points a reference, median of {args.steps}. "
        f"MFU: FLOPs without recomputation against {result['peak_tflops']:.4g} TFLOP/s; floor, of product: all FLOPs at "
        f"{result['product_tflops']:.4g} TFLOP/s, a large product's rate here. x twin: the naive twin's over ours.\n"
    )
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---:|" * len(COLUMNS))
    for row in result["rows"]:
        fits = row["s/step"] is not None
        print("| " + " | ".join(shown(row[column], fits) for column in COLUMNS) + " |")


def shown(value: Any, fits: bool) -> str:
    """A cell of a table; None where there is no such number, or where memory ran out."""
    if value is None:
        return "n/a" if fits else "does not fit"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
