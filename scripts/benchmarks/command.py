"""Benchmarks.

`python scripts/benchmark.py` measures training steps and sampling of two models on one thread: `mid`, whose time is that of products, and
`thin`, whose time is that of operations as such (scripts/benchmarks/speed.py). It is `train` and `infer` with their defaults.

`python scripts/benchmark.py train` measures training steps, optimizer included: random weights, latents and embeddings as from a cache. A
table of K x resolution x gradient checkpointing with step time, memory, TFLOP, utilisation, share of a large product's rate, and the naive
twin of tests/naive.py over ours (scripts/benchmarks/train.py).

`python scripts/benchmark.py infer` measures sampling: a table of K x size x mode (kept references, step caches, compiled blocks, batches,
attention kernels) with latency, memory, TFLOP, utilisation and the error against the plain path (scripts/benchmarks/infer.py).

`python scripts/benchmark.py against CHECKOUT` measures this checkout and another one in turns (scripts/benchmarks/against.py).

`python scripts/benchmark.py gpu` measures FLUX.1-dev's shape on a GPU in at most eight minutes (scripts/benchmarks/gpu.py).

`python scripts/benchmark.py page` writes what these have measured into docs/speed.md (scripts/benchmarks/page.py).

`python scripts/benchmark.py shared` measures training steps alone and beside a busy process at several spin counts of OpenMP
(scripts/benchmarks/shared_cpu.py).

`python scripts/benchmark.py supervision` measures what `loss.supervised_queries` adds to a training step, settings in turns
(scripts/benchmarks/supervision.py).

`python scripts/benchmark.py scoring` measures CPU time per picture and memory of scoring (scripts/benchmarks/scoring.py).

`python scripts/benchmark.py data` times the reader of our format and weighs its memory (scripts/benchmarks/data.py).
"""

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from mosaic.commands import NOTHING, command
from mosaic.files import require_file
from scripts.benchmarks import ROOT

REFERENCES = [1, 2, 4, 6]
#: What is measured of each model where the command line says nothing.
TRAIN: dict[str, dict[str, Any]] = {
    "pocket": {"sizes": [64], "checkpointing": ["none", "block"], "steps": 12},
    "thin": {"sizes": [64], "checkpointing": ["none"], "steps": 6},
    "mid": {"sizes": [256], "checkpointing": ["none"], "steps": 3},
    "flux_dev": {"sizes": [512, 1024], "checkpointing": ["none", "block"], "steps": 10},
}
ALL_MODES = ["target", "refresh:2", "refresh:4", "first-block:0.12", "batch:4", "compile", "isolated", "isolated-cache"]
KEPT_MODES = ["target", "isolated", "isolated-cache"]
INFER: dict[str, dict[str, Any]] = {
    "pocket": {"sizes": [64], "steps": 20, "runs": 5, "modes": ALL_MODES},
    "thin": {"sizes": [64], "steps": 6, "runs": 3, "modes": KEPT_MODES},
    "mid": {"sizes": [256], "steps": 4, "runs": 1, "modes": KEPT_MODES},
    "flux_dev": {"sizes": [512, 1024], "steps": 28, "runs": 5, "modes": ALL_MODES},
}
SIZES = ("reference_size", "text_tokens", "rank")  # of a model, by their flags
TRAIN_SIZES = (*SIZES, "batch_size", "points_per_reference")
#: The file of each command's `run`.
COMMANDS = {"shared": "shared_cpu"} | {
    name: name for name in ("speed", "train", "infer", "against", "gpu", "page", "data", "supervision", "scoring")
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["speed", *argv]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add_speed_arguments(commands.add_parser("speed", help="training steps and sampling of mid and thin; what runs without a command"))
    add_train_arguments(commands.add_parser("train", help="training steps: time, memory, utilisation"))
    add_infer_arguments(commands.add_parser("infer", help="sampling: latency, memory, utilisation, error"))
    add_against_arguments(commands.add_parser("against", help="this checkout and another one in turns"))
    add_gpu_arguments(commands.add_parser("gpu", help="FLUX.1-dev's shape on a GPU in at most eight minutes"))
    add_page_arguments(commands.add_parser("page", help="write the tables of docs/speed.md"))
    add_data_arguments(commands.add_parser("data", help="samples per second and memory of the reader"))
    add_shared_arguments(commands.add_parser("shared", help="training steps beside a busy process on the same cores"))
    add_supervision_arguments(commands.add_parser("supervision", help="what supervising the target's queries costs a training step"))
    add_scoring_arguments(commands.add_parser("scoring", help="CPU time and memory of scoring many pictures"))
    args = parser.parse_args(argv)
    if args.command == "train":
        complete_arguments(args, TRAIN[args.model], TRAIN_SIZES)
    if args.command == "infer":
        complete_arguments(args, INFER[args.model] if args.config is None else infer_defaults(parser, args), SIZES)
    check_arguments(parser, args)
    return args


def add_speed_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command `speed`."""
    parser.add_argument("--models", nargs="+", choices=["pocket", "thin", "mid"], default=["thin", "mid"], help="(thin mid)")
    parser.add_argument("--k", type=int, nargs="+", default=REFERENCES, help="numbers of references (1 2 4 6)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--no-twin", dest="twin", action="store_false", help="leave out the naive twin")
    parser.add_argument("--output", type=Path, help="write the result as JSON")


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that `train` and `infer` share; what is not given depends on the model."""
    parser.add_argument("--model", choices=sorted(TRAIN), default="pocket")
    parser.add_argument("--k", type=int, nargs="+", default=REFERENCES, help="numbers of references (1 2 4 6)")
    parser.add_argument("--sizes", type=int, nargs="+", help="sides of the target in px (pocket, thin 64; mid 256; flux_dev 512 1024)")
    parser.add_argument("--reference-size", type=int, help="side of a reference in px (pocket 32; thin 64; mid 256; flux_dev 512)")
    parser.add_argument("--text-tokens", type=int, help="text tokens (pocket 24; thin 8; mid 64; flux_dev 512)")
    parser.add_argument("--rank", type=int, help="LoRA rank (pocket 32; thin 4; mid, flux_dev 128)")
    parser.add_argument(
        "--clock", choices=["cpu", "wall"], default="cpu", help="of a CPU. cpu: the time that this process had, where others work too"
    )
    parser.add_argument(
        "--peak-tflops", type=float, help="rate that a utilisation is measured by (CUDA: the card's data sheet, else 989; CPU: measured)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--no-twin", dest="twin", action="store_false", help="leave out the naive twin, which is measured on a CPU only")
    parser.add_argument("--output", type=Path, help="write the result as JSON")


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command `train`; what is not given depends on the model."""
    add_measuring_arguments(parser)
    parser.add_argument("--checkpointing", nargs="+", help="modes of model.gradient_checkpointing (pocket, flux_dev none block; else none)")
    parser.add_argument("--batch-size", type=int, help="samples per step (pocket 16; else 1)")
    parser.add_argument("--points-per-reference", type=int, help="supervised points (pocket 9, as its world; thin 4; mid 32; flux_dev 256)")
    parser.add_argument("--steps", type=int, help="measured steps per cell and arm (pocket 12; thin 6; mid 3; flux_dev 10)")


def complete_arguments(args: argparse.Namespace, defaults: dict[str, Any], sizes: tuple[str, ...]) -> None:
    """Fill in the defaults of a model, and its own sizes; `references` are the values of K."""
    from scripts.benchmarks.models import MODELS

    for name, value in {**{size: getattr(MODELS[args.model], size) for size in sizes}, **defaults}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.references = args.k


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
    return {**INFER["pocket"], **sizes, "steps": settings.num_inference_steps}


def add_infer_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command `infer`; what is not given depends on the model."""
    add_measuring_arguments(parser)
    parser.add_argument("--config", type=Path, help="measure the model, adapter and cases of this config in the pocket model's place")
    parser.add_argument(
        "--modes",
        nargs="+",
        help="target, isolated, isolated-cache, compile, refresh:N, first-block:THRESHOLD, mag:THRESHOLD (flux_dev), batch:PICTURES, "
        "attention:KERNEL; `target` is always measured, `isolated` with isolated-cache "
        f"(pocket, flux_dev {' '.join(ALL_MODES)}; else {' '.join(KEPT_MODES)})",
    )
    parser.add_argument("--steps", type=int, help="sampling steps (pocket 20; thin 6; mid 4; flux_dev 28)")
    parser.add_argument("--runs", type=int, help="timed runs per mode, in turns (pocket, flux_dev 5; thin 3; mid 1)")
    parser.add_argument("--seed", type=int, default=42, help="of the start noise, and of random inputs")


def add_against_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command `against`."""
    parser.add_argument("other", type=Path, help="the other checkout of this repository: the one that ratios are to")
    parser.add_argument("--rounds", type=int, default=6, help="steps of each side in turns, in each pair of processes")
    parser.add_argument("--processes", type=int, default=2, help="pairs of processes for each task, one after the other")
    parser.add_argument(
        "--tasks",
        nargs="+",
        help='what is measured, such as "mid train 4": MODEL, train or target or cached, K (the goals of docs/speed.md)',
    )
    parser.add_argument("--output", type=Path, help="write the result as JSON, after every task; what is there is not measured again")


def add_gpu_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command `gpu`."""
    parser.add_argument("--model", choices=["flux_dev", "thin"], default="flux_dev", help="thin: the same on a CPU, to try it")
    parser.add_argument("--minutes", type=float, default=8.0, help="no measurement begins that would end later")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/gpu.json", help="write the result as JSON, after every cell")


def add_page_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command `page`."""
    parser.add_argument("--page", type=Path, default=ROOT / "docs/speed.md", help="the page with the markers")
    parser.add_argument("--results", type=Path, default=ROOT / "assets/speed", help="changes.json, and what was measured: NAME.json")


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
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if is_number and number < lowest.get(name, 1 if isinstance(number, int) else 1e-6):
                problem = "not be negative" if name in lowest else "be positive"
                parser.error(f"--{flags.get(name, name).replace('_', '-')} must {problem}, got {number}")
    if args.command == "data" and args.size % 16:
        parser.error(f"--size must be a multiple of 16, got {args.size}")
    if args.command == "train":
        from mosaic.model.costs import CHECKPOINTING_MODES

        for mode in args.checkpointing:
            if mode not in CHECKPOINTING_MODES:
                parser.error(f"--checkpointing must be of {', '.join(CHECKPOINTING_MODES)}, got {mode}")


def measure(argv: list[str] | None = None) -> dict[str, Any] | None:
    """Run the benchmark of a command line; returns the result.

    Raises:
        FileNotFoundError, OSError, ValueError: A file, the model or a flag will not do.
    """
    args = parse(argv)
    require_file(getattr(args, "output", None), "--output")
    run = importlib.import_module(f"scripts.benchmarks.{COMMANDS[args.command]}").run
    result: dict[str, Any] | None = run(args)
    return result


@command(NOTHING)
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    measure(argv)


def keep_memory() -> None:
    """Start anew with glibc set as train.sh sets it on a CPU: else fresh pages for large tensors cost percents of a step, at random."""
    wanted = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
    if sys.platform == "linux" and not wanted.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
