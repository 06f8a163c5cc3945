"""What a waiting thread costs: training steps at several spin counts of OpenMP, alone and beside a busy process.

The table of the command `shared` of scripts/benchmark.py. OpenMP's threads spin while they wait for one another. Where another process has
the core of one of them, all others spin until the scheduler comes round, and a step of thousands of parallel loops takes a minute
(`GOMP_SPINCOUNT`, set in mosaic/__init__.py). The count is read when torch is loaded, so each measurement is a process of its own.
"""

import argparse
import contextlib
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm import tqdm

from mosaic import SPIN_VARIABLES
from mosaic.files import write_text
from scripts.benchmarks import ROOT

WARM_UP_STEPS = 2
START_SECONDS = 120.0  # that a process may take to import and build
BUSY = "while True: pass"


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Measure, print a table, return the result.

    Raises:
        ValueError: This system cannot keep processes on some cores, or a measuring process has ended by itself.
    """
    if args.steps_of_one:
        measure_steps(args)
        return None
    if sys.platform != "linux":
        raise ValueError("processes are kept on some cores, which Python can do on Linux only.")
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    os.sched_setaffinity(0, cores)  # and with it all that is started here
    settings = [*(f"GOMP_SPINCOUNT={count}" for count in args.spin_counts), "OMP_WAIT_POLICY=PASSIVE"]
    seconds: dict[str, dict[int, list[float]]] = {setting: {0: [], args.competitors: []} for setting in settings}
    turns = [*((0, setting) for _ in range(args.rounds) for setting in settings), *((args.competitors, setting) for setting in settings)]
    for number, setting in tqdm(turns, desc="runs", unit="run"):
        with busy_processes(number):
            seconds[setting][number].append(seconds_per_step(setting, args))
    rows = {setting: {str(number): statistics.median(found) for number, found in counts.items()} for setting, counts in seconds.items()}
    result = {"threads": args.threads, "cores": cores, "competitors": args.competitors, "limit": args.limit, "seconds_per_step": rows}
    print_table(args, rows)
    if args.output:
        write_text(args.output, json.dumps(result, indent=2) + "\n")
    return result


def measure_steps(args: argparse.Namespace) -> None:
    """In a process of its own: print the seconds of one step after another, until it is ended."""
    import torch

    from mosaic.lora.adapter import reference_lora_parameters
    from mosaic.planning.dry_run import StandInStep
    from scripts.benchmarks.measuring import optimizer_step
    from scripts.benchmarks.models import measured_model

    torch.set_num_threads(args.threads)
    model = measured_model("pocket", batch_size=args.batch_size)
    config = model.config(4)
    transformer = model.build(config, "cpu")
    parameters = list(reference_lora_parameters(transformer).values())
    optimizer, loss = torch.optim.AdamW(parameters, lr=1e-4), StandInStep(config, model.shape, 4, transformer)
    print("ready", flush=True)
    while True:
        begin = time.perf_counter()
        optimizer_step(loss, parameters, optimizer)
        print(time.perf_counter() - begin, flush=True)


def seconds_per_step(setting: str, args: argparse.Namespace) -> float:
    """Median of the steps of `args.seconds`, after the first ones; `args.limit` where a single step takes longer than that.

    Raises:
        ValueError: The process has ended by itself.
    """
    kept = {name: value for name, value in os.environ.items() if name not in (*SPIN_VARIABLES, "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    name, _, value = setting.partition("=")
    options = ["--steps-of-one", "--threads", str(args.threads), "--batch-size", str(args.batch_size)]
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), "shared", *options]
    with lines_of(command, {**kept, name: value}) as lines:
        found: list[float] = []
        wait, end = START_SECONDS, float("inf")
        while time.perf_counter() < end:
            try:
                line = lines.get(timeout=wait)
            except queue.Empty:
                break
            if line is None:
                raise ValueError(f"the measuring process has ended by itself ({setting}).")
            if line.strip() != "ready":
                found.append(float(line))
            if len(found) == (0 if line.strip() == "ready" else WARM_UP_STEPS):
                end = time.perf_counter() + args.seconds
            wait = args.limit
    steps = found[WARM_UP_STEPS:] or found[-1:]
    return statistics.median(steps) if steps else args.limit


@contextlib.contextmanager
def lines_of(command: list[str], environ: Mapping[str, str]) -> Iterator["queue.Queue[str | None]"]:
    """A process and what it prints, line by line, then None; it is ended at the end."""
    process = subprocess.Popen(command, env=dict(environ), stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None  # it is a pipe
        with process.stdout as printed:
            for line in printed:
                lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield lines
    finally:
        process.kill()
        process.wait()
        reader.join()


@contextlib.contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """So many processes that compute without end."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def print_table(args: argparse.Namespace, rows: Mapping[str, Mapping[str, float]]) -> None:
    """The result as a Markdown table; costs are against the first spin count, alone."""
    base = next(iter(rows.values()))["0"]
    print(f"Steps of the pocket model, K = 4, batch {args.batch_size}, {args.threads} threads on as many cores, s/step:\n")
    print(f"| setting | alone | cost % | beside {args.competitors} busy | x alone |\n|---|---:|---:|---:|---:|")
    for setting, found in rows.items():
        alone, shared = found["0"], found[str(args.competitors)]
        more = "> " if shared >= args.limit else ""
        print(f"| `{setting}` | {alone:.3f} | {100 * (alone / base - 1):+.1f} | {more}{shared:.2f} | {more}{shared / base:.1f} |")
