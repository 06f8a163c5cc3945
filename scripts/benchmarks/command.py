"""Benchmarks.

`python scripts/benchmark.py train` measures training steps, optimizer included: random weights, latents and embeddings as from a cache. A
table of K x resolution x gradient checkpointing with step time, memory, TFLOP and utilisation (benchmarks/train.py): of FLUX.1-dev's
shape with `--model flux_dev`, where that fits, or of the pocket transformer's with `--model pocket`, then also against the naive twin
(scripts/benchmarks/twin.py).

`python scripts/benchmark.py infer` measures sampling: a table of K x size x mode (kept references, step caches, compiled blocks, batches,
attention kernels) with latency, memory, TFLOP, utilisation and the error against the plain path (scripts/benchmarks/infer.py).

`python scripts/benchmark.py shared` measures training steps alone and beside a busy process at several spin counts of OpenMP
(scripts/benchmarks/shared_cpu.py).

`python scripts/benchmark.py supervision` measures what `loss.supervised_queries` adds to a training step, settings in turns
(scripts/benchmarks/supervision.py).

`python scripts/benchmark.py scoring` measures CPU time per picture and memory of scoring (scripts/benchmarks/scoring.py).

`python scripts/benchmark.py data` times the reader of our format and weighs its memory (scripts/benchmarks/data.py).
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

from mosaic.commands import NOTHING, command
from mosaic.files import require_file, write_text
from scripts.benchmarks import twin as twin_benchmark
from scripts.benchmarks.twin import ARMS, REFERENCE_SIDE

DEFAULTS: dict[str, dict[str, Any]] = {
    "pocket": {
        "k": [4],
        "sizes": [64],
        "reference_size": 32,
        "batch_size": 16,
        "rank": 32,
        "text_tokens": 24,
        "max_points": 1024,
        "steps": 36,
    },
    "flux_dev": {
        "k": [1, 2, 4, 6],
        "sizes": [512, 1024],
        "reference_size": 512,
        "batch_size": 1,
        "rank": 128,
        "text_tokens": 512,
        "max_points": 1024,
        "steps": 10,
    },
}

INFER_MODES = ["target", "refresh:2", "refresh:4", "first-block:0.12", "batch:4", "compile", "isolated", "isolated-cache"]
INFER_DEFAULTS: dict[str, dict[str, Any]] = {
    "pocket": {"sizes": [64], "reference_size": 32, "text_tokens": 24, "steps": 20},
    "flux_dev": {"sizes": [512, 1024], "reference_size": 512, "text_tokens": 512, "steps": 28},
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="training steps: time, memory, utilisation")
    add_train_arguments(train)
    add_infer_arguments(commands.add_parser("infer", help="sampling: latency, memory, utilisation, error"))
    add_data_arguments(commands.add_parser("data", help="samples per second and memory of the reader"))
    add_shared_arguments(commands.add_parser("shared", help="training steps beside a busy process on the same cores"))
    add_supervision_arguments(commands.add_parser("supervision", help="what supervising the target's queries costs a training step"))
    add_scoring_arguments(commands.add_parser("scoring", help="CPU time and memory of scoring many pictures"))
    args = parser.parse_args(argv)
    if args.command == "train":
        complete_arguments(args, DEFAULTS)
    if args.command == "infer":
        complete_arguments(args, INFER_DEFAULTS if args.config is None else {args.model: infer_defaults(parser, args)})
    check_arguments(parser, args)
    return args


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command `train`; what is not given depends on the model."""
    parser.add_argument("--model", choices=sorted(DEFAULTS), default="pocket")
    parser.add_argument(
        "--k", type=int, nargs="+", help="references per sample; the twin is measured at the first (pocket 4; flux_dev 1 2 4 6)"
    )
    parser.add_argument("--sizes", type=int, nargs="+", help="sides of the target in px (pocket 64; flux_dev 512 1024)")
    parser.add_argument("--checkpointing", nargs="+", default=["none", "block"], help="modes of model.gradient_checkpointing")
    parser.add_argument("--reference-size", type=int, help="side of a reference in px (pocket 32; flux_dev 512)")
    parser.add_argument("--batch-size", type=int, help="samples per step (pocket 16; flux_dev 1)")
    parser.add_argument("--rank", type=int, help="LoRA rank (pocket 32; flux_dev 128)")
    parser.add_argument("--text-tokens", type=int, help="text tokens (pocket 24; flux_dev 512)")
    parser.add_argument("--max-points", type=int, help="points per sample in the table (1024, or as many as the references have tokens)")
    parser.add_argument(
        "--peak-tflops", type=float, help="rate that a utilisation is measured by (CUDA: the card's data sheet, else 989; CPU: measured)"
    )
    parser.add_argument(
        "--steps", type=int, help="measured steps per cell and per arm; for the twin best a multiple of 6 (pocket 36; flux_dev 10)"
    )
    parser.add_argument("--points-per-reference", type=int, default=9, help="twin: mean P; the default is the pocket world's at K = 4")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)


def complete_arguments(args: argparse.Namespace, defaults: dict[str, dict[str, Any]]) -> None:
    """Fill in the model's defaults; `references` are all values of K, `k` the first."""
    for name, value in defaults[args.model].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.references, args.k = args.k, args.k[0]


def infer_defaults(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """What `--config` says of the flags that are not given; `args.config` becomes the loaded config."""
    from mosaic.config.loading import load_config

    if args.model != "pocket":
        parser.error(f"--config names a model of its own, so --model {args.model} must be left out")
    try:
        args.config = load_config(args.config)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    settings = args.config.inference
    sizes = {"sizes": [settings.height], "reference_size": args.config.data.reference_size, "text_tokens": args.config.model.text_length}
    return {**sizes, "steps": settings.num_inference_steps}


def add_infer_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command `infer`; what is not given depends on the model."""
    parser.add_argument("--model", choices=sorted(INFER_DEFAULTS), default="pocket")
    parser.add_argument("--config", type=Path, help="measure the model, adapter and cases of this config in the pocket model's place")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 6], help="numbers of references")
    parser.add_argument("--sizes", type=int, nargs="+", help="sides of the target in px (pocket 64; flux_dev 512 1024)")
    parser.add_argument(
        "--modes",
        nargs="+",
        default=INFER_MODES,
        help="target, isolated, isolated-cache, compile, refresh:N, first-block:THRESHOLD, mag:THRESHOLD (flux_dev), batch:PICTURES, "
        f"attention:KERNEL; `target` is always measured, `isolated` with isolated-cache ({' '.join(INFER_MODES)})",
    )
    parser.add_argument("--reference-size", type=int, help="side of a reference in px (pocket 32; flux_dev 512)")
    parser.add_argument("--text-tokens", type=int, help="text tokens (pocket 24; flux_dev 512)")
    parser.add_argument("--steps", type=int, help="sampling steps (pocket 20; flux_dev 28)")
    parser.add_argument("--rank", type=int, default=128, help="rank of flux_dev's random LoRA; the pocket model has its own")
    parser.add_argument("--runs", type=int, default=5, help="timed runs per mode, in turns")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: the time this process had, where others work too")
    parser.add_argument("--seed", type=int, default=42, help="of the start noise, and of random inputs")
    parser.add_argument("--peak-tflops", type=float, help="rate that a utilisation is measured by (CUDA: the card's data sheet, else 989)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--output", type=Path, help="write the result as JSON")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command `data`."""
    parser.add_argument("--size", type=int, default=512, help="side of targets and references in px")
    parser.add_argument("--k", type=int, default=2, help="references per sample")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of loader processes to time")
    parser.add_argument("--seconds", type=float, default=8.0, help="time measured for each of them")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 100_000, 1_000_000], help="manifest rows to measure memory at")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument("--open-only", type=Path, help=argparse.SUPPRESS)


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command `shared`."""
    parser.add_argument("--spin-counts", type=int, nargs="+", default=[300_000, 20_000, 3000, 1000, 300], help="the first is libgomp's own")
    parser.add_argument("--competitors", type=int, default=1, help="busy processes")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, and cores that all processes share")
    parser.add_argument("--batch-size", type=int, default=16, help="samples per step")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each setting alone, in turns; beside others: one")
    parser.add_argument("--seconds", type=float, default=5.0, help="time measured in each run")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that a single step may take")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument("--steps-of-one", action="store_const", const=True, help=argparse.SUPPRESS)


def add_supervision_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command `supervision`."""
    parser.add_argument(
        "--model",
        choices=("pocket", "wide", "flux_dev"),
        default="wide",
        help="wide: 3 blocks of width 512, 256 tokens a picture (default)",
    )
    parser.add_argument("--k", type=int, default=4, help="references per sample")
    parser.add_argument("--max-points", type=int, default=128, help="points per sample, at most as many as the references have tokens")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each setting, in turns")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path, help="write the result as JSON")


def add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command `scoring`."""
    parser.add_argument("--pictures", type=int, nargs="+", default=[450, 4500], help="numbers of pictures, six a case")
    parser.add_argument("--size", type=int, default=512, help="sides of pictures and references in px")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Name the flag whose value cannot be."""
    lowest, flags = {"workers": 0, "seed": 0}, {"references": "k"}
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and number < lowest.get(name, 1 if isinstance(number, int) else 1e-6):
                problem = "not be negative" if name in lowest else "be positive"
                parser.error(f"--{flags.get(name, name).replace('_', '-')} must {problem}, got {number}")
    if args.command == "data" and args.size % 16:
        parser.error(f"--size must be a multiple of 16, got {args.size}")
    if args.command == "train":
        if args.points_per_reference > REFERENCE_SIDE**2:
            limit = f"at most {REFERENCE_SIDE**2}, a reference's tokens"
            parser.error(f"--points-per-reference must be {limit}, got {args.points_per_reference}")
        from mosaic.model.costs import CHECKPOINTING_MODES

        for mode in args.checkpointing:
            if mode not in CHECKPOINTING_MODES:
                parser.error(f"--checkpointing must be of {', '.join(CHECKPOINTING_MODES)}, got {mode}")


def run_train(args: argparse.Namespace) -> dict[str, Any] | None:
    """The command `train`."""
    if args.memory_of:
        twin_benchmark.measure_memory(args)
        return None
    from scripts.benchmarks import train as train_benchmark

    result = train_benchmark.run(args)
    if args.model == "pocket":
        print()
        result |= twin_benchmark.compare(args)
    if args.output:
        write_text(args.output, json.dumps(result, indent=2) + "\n")
    return result


def measure(argv: list[str] | None = None) -> dict[str, Any] | None:
    """Run the benchmark of a command line; returns the result.

    Raises:
        FileNotFoundError, OSError, ValueError: A file, the model or a flag will not do.
    """
    args = parse(argv)
    require_file(args.output, "--output")
    if args.command == "data":
        from scripts.benchmarks import data as data_benchmark

        return data_benchmark.run(args)
    if args.command == "shared":
        from scripts.benchmarks import shared_cpu

        return shared_cpu.run(args)
    if args.command == "supervision":
        from scripts.benchmarks import supervision

        return supervision.run(args)
    if args.command == "scoring":
        from scripts.benchmarks import scoring as scoring_benchmark

        return scoring_benchmark.run(args)
    if args.command == "infer":
        from scripts.benchmarks import infer as infer_benchmark

        return infer_benchmark.run(args)
    return run_train(args)


@command(NOTHING)
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    measure(argv)


def keep_memory() -> None:
    """Start anew with glibc set as train.sh sets it on a CPU: else fresh pages for large tensors cost percents of a step, at random."""
    wanted = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
    if sys.platform == "linux" and not wanted.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
