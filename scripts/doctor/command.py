"""Looks over a data set and says whether it can supervise: points, masks, disjointness, duplicates, sizes, captions.

    python scripts/doctor.py DATA [--config CONFIG] [--json findings.json] [--html findings.html]

DATA is a folder in the multi-reference format (preprocess/FORMAT.md) or SemAlign-MS-Subjects200K in its released layout. Exit code 0: fit
for training; 1: not fit (supervision is starved, points lie beside their subjects, samples cannot be read), or somebody should look at the
matches first; 2: the command is wrong, or DATA as a whole cannot be read.
"""

import argparse
import os
from pathlib import Path

from mosaic.commands import NOTHING, command


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a data set: a folder, or an id of the Hugging Face hub")
    parser.add_argument(
        "--config", help="config of the training that is planned; its sizes, split and limits hold, unless a flag says else"
    )
    parser.add_argument("--split", help='split to look at (default: train; SemAlign: "train", "heldout" or "all")')
    parser.add_argument("--json", type=Path, help="write the findings here")
    parser.add_argument("--html", type=Path, help="write a page with pictures here")
    parser.add_argument(
        "--against", type=Path, metavar="FOLDER", help="points of another extractor (match.py --output): how far they agree"
    )
    parser.add_argument("--looked", action="store_true", help="somebody has looked at the matches: doubts are named but do not count")
    parser.add_argument("--limit", type=int, help="look at no more than this many samples, spread evenly")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that read")
    parser.add_argument("--min-coverage", type=float, help="share of the references that must have points (default: 0.95)")
    parser.add_argument("--max-outside", type=float, help="share of points that may lie outside their subjects (default: 0.05)")
    parser.add_argument("--image-size", type=int, help="side of the target in training, px (default: 512)")
    parser.add_argument("--reference-size", type=int, help="side of a reference in training, px (default: 512)")
    parser.add_argument("--token-size", type=int, help="px per token side (default: 16, of FLUX.1)")
    parser.add_argument("--text-length", type=int, help="text tokens in training (default: 512)")
    args = parser.parse_args(argv)
    for name in ("limit", "image_size", "reference_size", "token_size", "text_length"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    if args.token_size is not None and args.token_size % 2:
        parser.error(f"--token-size must be even, for a token is 2 x 2 latents, got {args.token_size}")
    if args.workers < 0:
        parser.error(f"--workers must not be negative, got {args.workers}")
    for name in ("min_coverage", "max_outside"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} must lie in [0, 1], got {getattr(args, name)}")
    return args


@command(NOTHING)
def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = parse_arguments(argv)
    from scripts.doctor.examination import run  # torch and the like only once the arguments stand

    return run(arguments)
