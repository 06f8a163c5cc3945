"""Time and peak memory of matching one pair of feature maps, each measured in a process of its own."""

import multiprocessing
import resource
import signal
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from preprocess.matching.matching import CHUNK_SIZE, match_features


def benchmark(sides: list[int], channels: int, device: str, repeats: int) -> list[dict[str, Any]]:
    """Measure `match_features` on square grids of random features, both directions and the margin included.

    Args:
        sides: Cells per side of the grids.
        channels: Of the feature maps.
        device: Where to compute; one thread on a CPU, as in match.py.
        repeats: Runs per grid, of which the median time counts.

    Returns:
        Per grid: side, seconds per pair, and peak MiB above the two feature maps.
    """
    context = multiprocessing.get_context("spawn")
    entries = []
    for side in sides:
        with ProcessPoolExecutor(1, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as executor:  # Ctrl-C is this process's
            entries.append(executor.submit(_measure, side, channels, device, repeats).result())
    return entries


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown table of the measurements."""
    lines = ["| grid | channels | device | seconds per pair | peak memory above the features, MiB |", "|---|---|---|---|---|"]
    for entry in entries:
        grid = f"{entry['side']} x {entry['side']}"
        lines.append(f"| {grid} | {entry['channels']} | {entry['device']} | {entry['seconds']:.2f} | {entry['peak_mib']:.0f} |")
    return "\n".join(lines)


def _measure(side: int, channels: int, device: str, repeats: int) -> dict[str, Any]:
    """One grid, in this process."""
    torch.set_num_threads(1)
    on_gpu = device.startswith("cuda")
    generator = torch.Generator().manual_seed(0)
    target, reference = (torch.randn(channels, side, side, generator=generator).to(device) for _ in range(2))
    small = torch.randn(8, 4, 4, generator=generator).to(device)
    match_features(small, small)  # loads kernels
    before = torch.cuda.memory_allocated() if on_gpu else _peak_bytes()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        match_features(target, reference)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if on_gpu else _peak_bytes()
    return {
        "side": side,
        "channels": channels,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "chunk_size": CHUNK_SIZE,
        "seconds": statistics.median(seconds),
        "peak_mib": (peak - before) / 2**20,
    }


def _peak_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
