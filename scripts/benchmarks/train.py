"""Training steps over K x resolution x gradient checkpointing: the table of the command `train` of scripts/benchmark.py.

Each cell runs the real forward pass, losses, backward pass, clipping and AdamW on a model with random weights. Beside the step's time stand
what bounds it from below (the FLOP model at the rate of a large matrix product on this device) and the share of captured rows and losses.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mosaic.config.loading import Config, from_dict
from mosaic.lora.adapter import reference_lora_parameters
from mosaic.model.costs import lora_parameter_count
from mosaic.planning.dry_run import StandInStep, build_transformer
from mosaic.planning.memory_model import FORMAT_BYTES, GIB
from mosaic.planning.model_shape import FLUX_DEV_SHAPE, ModelShape, read_model_shape
from mosaic.planning.preflight import ASSUMED_PEAK_TFLOPS, find_device, step_tflop
from mosaic.planning.storage_meter import StorageMeter
from mosaic.training.watch.throughput import known_peak
from scripts.benchmarks.twin import POCKET_GEOMETRY, ROOT

WARM_UP_STEPS = 2
PRODUCT_SIDE = {"cuda": 8192, "cpu": 1024}  # of the matrices whose product gives the device's rate
COLUMNS = ("px", "K", "checkpointing", "s/step", "peak GiB", "TFLOP", "MFU %", "floor s", "x floor", "capture and losses %")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every cell, print the table, return the result.

    Raises:
        ValueError: If the model cannot fit this machine.
    """
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = model_shape(args.model)
    check_room(args, shape)
    rate = product_tflops(device, torch.bfloat16 if args.model == "flux_dev" else torch.float32)
    peak = args.peak_tflops or known_peak(torch.device(device)) or (ASSUMED_PEAK_TFLOPS if device == "cuda" else rate)
    cells = [(size, k, mode) for size in args.sizes for k in args.references for mode in args.checkpointing]
    rows = []
    for size, k, mode in tqdm(cells, desc="cells", unit="cell"):
        rows.append({"px": size, "K": k, "checkpointing": mode} | measure(args, shape, size, k, mode, device, peak, rate))
    name = torch.cuda.get_device_name(0) if device == "cuda" else f"{args.threads} CPU threads"
    result = {"model": args.model, "device": name, "product_tflops": rate, "peak_tflops": peak, "rank": args.rank, "rows": rows}
    print_table(args, result)
    return result


def model_shape(model: str) -> ModelShape:
    """FLUX.1-dev's shape, or that of the pocket model, also in a checkout without its weights."""
    if model == "flux_dev":
        return FLUX_DEV_SHAPE
    folder = ROOT / "assets/pocket/flux"
    return read_model_shape(str(folder)) if folder.is_dir() else ModelShape(POCKET_GEOMETRY, 4, {}, is_local=False)


def config_of(args: argparse.Namespace, size: int, mode: str) -> Config:
    """Settings of a cell."""
    large = args.model == "flux_dev"
    return from_dict(
        {
            "model": {
                "dtype": "bfloat16" if large else "float32",
                "text_length": args.text_tokens,
                "gradient_checkpointing": mode,
            },
            "lora": {"rank": args.rank},
            "data": {"image_size": [size, size], "reference_size": args.reference_size},
            "loss": {"max_points": args.max_points},
            "training": {"batch_size": args.batch_size, "mixed_precision": "bf16" if large else "no"},
        }
    )


def check_room(args: argparse.Namespace, shape: ModelShape) -> None:
    """Refuse a model whose weights and optimizer state alone leave no room.

    Raises:
        ValueError: With the numbers, and the other way to measure.
    """
    config = config_of(args, args.sizes[0], "none")
    device = find_device(config, None)
    needed = shape.base_parameters * FORMAT_BYTES[config.model.dtype] + 16 * lora_parameter_count(shape.transformer, args.rank)
    if device.memory is not None and needed > device.memory:
        raise ValueError(
            f"--model {args.model} needs {needed / GIB:.1f} GiB for weights, gradients and optimizer state alone, but {device.name} have "
            f"{device.memory / GIB:.1f} GiB. Use --model pocket here, or a GPU of 80 GB."
        )


def measure(
    args: argparse.Namespace, shape: ModelShape, size: int, num_references: int, mode: str, device: str, peak: float, rate: float
) -> dict[str, Any]:
    """One cell; where memory runs out on the way, its numbers are None."""
    config = config_of(args, size, mode)
    needed, useful = (step_tflop(config, shape, num_references, name) for name in (mode, "none"))
    row: dict[str, Any] = {"TFLOP": needed, "floor s": needed / rate}
    try:
        seconds, bare, memory = _measured(args, config, shape, num_references, device)
    except torch.OutOfMemoryError:
        return row | dict.fromkeys(("s/step", "peak GiB", "MFU %", "x floor", "capture and losses %"))
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    median = statistics.median(seconds)
    share = statistics.median(100 * (whole - part) / whole for whole, part in zip(seconds, bare, strict=True))
    return row | {
        "s/step": median,
        "peak GiB": memory / GIB,
        "MFU %": 100 * useful / (median * peak),
        "x floor": median / row["floor s"],
        "capture and losses %": share,
    }


def _measured(
    args: argparse.Namespace, config: Config, shape: ModelShape, num_references: int, device: str
) -> tuple[list[float], list[float], int]:
    """Seconds of each step with and without captured rows, in turns, and the peak of the former in bytes."""
    transformer = build_transformer(config, shape, device)
    parameters = list(reference_lora_parameters(transformer).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    losses = [StandInStep(config, shape, num_references, transformer, supervised) for supervised in (True, False)]
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(WARM_UP_STEPS + args.steps):
        for loss, own in zip(losses, times, strict=True):
            seconds = timed(partial(optimizer_step, loss, parameters, optimizer), device)
            if index >= WARM_UP_STEPS:
                own.append(seconds)
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    tensors = [*transformer.parameters(), *state]
    return *times, peak_bytes(lambda: optimizer_step(losses[0], parameters, optimizer), tensors, device)


def optimizer_step(loss: Callable[[], Tensor], parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Forward, backward, clipping, update: what a step of training does."""
    loss().backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def timed(function: Callable[[], Any], device: str) -> float:
    """Seconds from an idle device to an idle device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(step: Callable[[], Any], tensors: Sequence[Tensor], device: str) -> int:
    """Most bytes of tensors alive in a step: CUDA's allocator says, on a CPU they are counted."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with StorageMeter() as meter:
        meter.mark("given", tensors)
        meter.reset_peak()
        step()
    return meter.peak.total()


def product_tflops(device: str, dtype: torch.dtype) -> float:
    """The rate of a large matrix product: best of ten."""
    side = PRODUCT_SIDE[device]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(timed(lambda: left @ right, device) for _ in range(10)) / 1e12


def print_table(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """The result as a Markdown table."""
    print(
        f"Training steps of {result['model']} on {result['device']}: rank {args.rank}, batch {args.batch_size}, median of {args.steps}. "
        f"MFU: FLOPs without recomputation against {result['peak_tflops']:.4g} TFLOP/s; "
        f"floor: all FLOPs at {result['product_tflops']:.4g} TFLOP/s, a large product's rate here.\n"
    )
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---:|" * len(COLUMNS))
    for row in result["rows"]:
        print("| " + " | ".join(_shown(row[column]) for column in COLUMNS) + " |")


def _shown(value: Any) -> str:
    return "does not fit" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
