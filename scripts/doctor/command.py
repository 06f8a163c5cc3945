"""Looks over a data set and says whether it can supervise: points, masks, disjointness, duplicates, sizes, captions.

    python scripts/doctor.py DATA [--json findings.json] [--html findings.html]

DATA is a folder in the multi-reference format (preprocess/FORMAT.md) or SemAlign-MS-Subjects200K in its released layout. Exit code 0: fit
for training; 1: supervision is starved, or samples cannot be read; 2: the command is wrong, or DATA as a whole cannot be read.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from mosaic.config.loading import DataConfig
from mosaic.data import Inspection, TrainingDataset, open_dataset
from mosaic.data.multi_reference.repository import hub_id, parquet_columns
from mosaic.data.readable import Attempt, Unreadable
from mosaic.files import in_one_line, require_file, write_text
from mosaic.method.grids import token_grid
from scripts.doctor.findings import Findings, Training, summarise
from scripts.doctor.page import PICTURES, write_findings


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a data set: a folder, or an id of the Hugging Face hub")
    parser.add_argument("--split", default="train", help='split to look at (SemAlign: "train", "heldout" or "all")')
    parser.add_argument("--json", type=Path, help="write the findings here")
    parser.add_argument("--html", type=Path, help="write a page with pictures here")
    parser.add_argument("--limit", type=int, help="look at no more than this many samples, spread evenly")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that read")
    parser.add_argument("--min-coverage", type=float, default=0.95, help="share of the references that must have points")
    parser.add_argument("--image-size", type=int, default=512, help="side of the target in training, px")
    parser.add_argument("--reference-size", type=int, default=512, help="side of a reference in training, px")
    parser.add_argument("--token-size", type=int, default=16, help="px per token side (FLUX.1: 16, pocket: 8)")
    parser.add_argument("--text-length", type=int, default=512, help="text tokens in training")
    args = parser.parse_args(argv)
    for name in ("limit", "image_size", "reference_size", "token_size", "text_length"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    if args.token_size % 2:
        parser.error(f"--token-size must be even, for a token is 2 x 2 latents, got {args.token_size}")
    if args.workers < 0 or not 0 <= args.min_coverage <= 1:
        parser.error(f"--workers must not be negative and --min-coverage lie in [0, 1], got {args.workers} and {args.min_coverage}")
    return args


def open_data(args: argparse.Namespace) -> TrainingDataset:
    """The data set, its layout told by `dataset.json` or the column `references`, which only our format has."""
    is_ours = "://" in args.data or (Path(args.data) / "dataset.json").exists() or "references" in parquet_columns(Path(args.data))
    layout: Literal["multi_reference", "semalign"] = (
        "multi_reference" if is_ours or (not Path(args.data).exists() and hub_id(args.data)) else "semalign"
    )
    if layout == "semalign" and Path(args.data).is_dir() and not (Path(args.data) / "data").is_dir():
        raise FileNotFoundError(
            f"{args.data}: holds neither dataset.json (multi-reference format) nor a folder data with Parquet files (SemAlign layout)."
        )
    sizes = [token_grid(side, side, args.token_size // 2, where) for side, where in _sides(args)]
    data = DataConfig(
        format=layout, root=args.data, split=args.split, image_size=(args.image_size, args.image_size), reference_size=args.reference_size
    )
    return open_dataset(data, args.split, *sizes)


def _sides(args: argparse.Namespace) -> list[tuple[int, str]]:
    return [(args.image_size, "--image-size"), (args.reference_size, "--reference-size")]


def inspections(dataset: TrainingDataset, args: argparse.Namespace) -> Iterator[Inspection | Unreadable]:
    """The samples that are looked at, in order."""
    count = min(args.limit or len(dataset), len(dataset))
    chosen = np.unique(np.linspace(0, len(dataset) - 1, count).astype(int)).tolist()
    loader = DataLoader(Subset(Attempt(dataset, "inspect"), chosen), batch_size=None, num_workers=args.workers)
    yield from tqdm(loader, desc="looking at samples", unit="sample", disable=not sys.stderr.isatty())


def print_findings(summary: dict[str, Any]) -> None:
    """The findings on the screen."""
    coverage, points = summary["coverage"], summary["points_per_reference"]
    masked = summary["points_outside_masks"]["share"]
    print(f"samples            {summary['samples']}, unreadable {summary['unreadable']['count']}")
    print(f"references         {summary['references_per_sample']} (K: samples)")
    print(f"with points        {coverage['points']:.1%} of references; with masks {coverage['masks']:.1%}; missing {coverage['missing']}")
    print(f"points             median {points['median']:g}, mean {points['mean']:.1f}, {points['min']} to {points['max']} per reference")
    print(f"outside masks      {'no masks' if masked is None else f'{masked:.1%} of points'}")
    print(f"not disjoint       {summary['disjointness_violations']['count']} samples")
    print(f"near-duplicates    {summary['near_duplicates']['pairs']} pairs of targets")
    print(f"sizes              {', '.join(f'{size} ({number})' for size, _, number in summary['target_sizes'][:4])}")
    print(f"captions           {summary['captions']['distinct']} different, {len(summary['captions']['empty'])} empty")
    print(f"tokens per sample  {summary['tokens_per_sample']:.0f}")
    for name, value in summary["data_set"].items():
        print(f"{name:18s} {value}")
    for reason in summary["reasons"]:
        print(f"NOT FIT: {reason}")
    if summary["healthy"]:
        print("fit for training")


def main(argv: list[str] | None = None) -> int:
    """Look, print and write; returns the exit code."""
    args = parse_arguments(argv)
    try:
        require_file(args.json, "--json")
        require_file(args.html, "--html")
        dataset = open_data(args)
        training = Training(args.token_size, (args.image_size,) * 2, args.reference_size, args.text_length, args.min_coverage)
        findings = Findings(training)
        shown: list[Inspection] = []
        for found in inspections(dataset, args):
            findings.add(found)
            if isinstance(found, Inspection) and len(shown) < PICTURES:
                shown.append(found)
        summary = summarise(findings) | {"data_set": dataset.report()}
        print_findings(summary)
        if args.json:
            write_text(args.json, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        if args.html:
            write_findings(summary, shown, args.html, title=f"Data set {args.data}")
    except (OSError, ValueError) as error:
        print(f"doctor.py: error: {in_one_line(error)}", file=sys.stderr)
        return 2
    return 0 if summary["healthy"] else 1
