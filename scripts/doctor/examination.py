"""What scripts/doctor.py does: open a data set, look at its samples, print and write the findings."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from mosaic.config.loading import DataConfig
from mosaic.data import Inspection, TrainingDataset, open_dataset
from mosaic.data.inspection import spread_evenly
from mosaic.data.multi_reference.repository import hub_id, parquet_columns
from mosaic.data.readable import Attempt, Unreadable
from mosaic.files import in_one_line, require_file, write_text
from mosaic.method.grids import token_grid
from scripts.doctor.findings import Findings, Training, summarise
from scripts.doctor.page import PICTURES, write_findings


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
    target, reference = [token_grid(side, side, args.token_size // 2, where) for side, where in _sides(args)]
    data = DataConfig(
        format=layout, root=args.data, split=args.split, image_size=(args.image_size, args.image_size), reference_size=args.reference_size
    )
    return open_dataset(data, args.split, target, reference)


def _sides(args: argparse.Namespace) -> list[tuple[int, str]]:
    return [(args.image_size, "--image-size"), (args.reference_size, "--reference-size")]


def inspections(dataset: TrainingDataset, args: argparse.Namespace) -> Iterator[Inspection | Unreadable]:
    """The samples that are looked at, in order."""
    chosen = spread_evenly(len(dataset), args.limit or len(dataset))
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
    white = summary["points_on_white"]["share"]
    print(f"outside masks      {'no masks' if masked is None else f'{masked:.1%} of points'}")
    print(f"on white           {'no points' if white is None else f'{white:.1%} of points, beside the subject of a reference'}")
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


def run(args: argparse.Namespace) -> int:
    """Look, print and write; returns the exit code."""
    try:
        require_file(args.json, "--json")
        require_file(args.html, "--html")
        dataset = open_data(args)
        training = Training(
            args.token_size, (args.image_size,) * 2, args.reference_size, args.text_length, args.min_coverage, args.max_outside
        )
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
