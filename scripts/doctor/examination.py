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
from mosaic.data import Inspection, MultiReferenceDataset, TrainingDataset, open_dataset
from mosaic.data.inspection import spread_evenly
from mosaic.data.multi_reference.repository import hub_id, parquet_columns
from mosaic.data.readable import Attempt, Unreadable
from mosaic.files import in_one_line, read_json, require_file, write_text
from mosaic.method.grids import token_grid
from scripts.doctor.comparison import Compared
from scripts.doctor.findings import Findings, Training, summarise
from scripts.doctor.matches import Matches
from scripts.doctor.page import Sheet, write_findings
from scripts.doctor.wording import LOOK, rows


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


def compared(dataset: TrainingDataset, folder: Path) -> Compared:
    """The samples, with the points of another folder held against their own. Raises as `Compared`, and for the released layout."""
    if not isinstance(dataset, MultiReferenceDataset):
        raise ValueError(
            "--against: needs data in the multi-reference format; SemAlign's points are the agreement of two matchers already."
        )
    return Compared(dataset, folder)


def inspections(dataset: TrainingDataset, args: argparse.Namespace) -> Iterator[Inspection | Unreadable]:
    """The samples that are looked at, in order."""
    chosen = spread_evenly(len(dataset), args.limit or len(dataset))
    read = dataset if args.against is None else compared(dataset, args.against)
    loader = DataLoader(Subset(Attempt(read, "inspect"), chosen), batch_size=None, num_workers=args.workers)
    yield from tqdm(loader, desc="looking at samples", unit="sample", disable=not sys.stderr.isatty())


def extractors_of(data: str) -> list[str]:
    """Names of the extractors that made the points of a local data set, as matching.json has them; none where there is no such file.

    Raises:
        ValueError: The file is damaged.
    """
    path = Path(data) / "matching.json"
    settings = read_json(path) if path.is_file() else {}
    names = settings.get("order", []) if isinstance(settings, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{path}: must name the extractors in "order", as preprocess/match.py writes it.')
    return names


def print_findings(summary: dict[str, Any]) -> None:
    """The findings on the screen."""
    for name, value in rows(summary):
        print(f"{name:24s} {value}")
    print(f"{LOOK} --html writes one.")
    for reason in summary["reasons"]:
        print(f"NOT FIT: {reason}")
    for doubt in summary["doubts"]:
        print(f"LOOK FIRST: {doubt}")
    print(summary["verdict"])


def run(args: argparse.Namespace) -> int:
    """Look, print and write; returns the exit code."""
    try:
        require_file(args.json, "--json")
        require_file(args.html, "--html")
        dataset = open_data(args)
        training = Training(
            args.token_size, (args.image_size,) * 2, args.reference_size, args.text_length, args.min_coverage, args.max_outside
        )
        findings, sheet = Findings(training, args.looked, matches=Matches(extractors_of(args.data))), Sheet()
        for found in inspections(dataset, args):
            findings.add(found)
            if args.html and isinstance(found, Inspection):
                sheet.add(found, findings.matches.lowest.get(found.id))
        summary = summarise(findings) | {"data_set": dataset.report()}
        print_findings(summary)
        if args.json:
            write_text(args.json, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        if args.html:
            write_findings(summary, sheet, args.html, title=f"Data set {args.data}")
    except (OSError, ValueError) as error:
        print(f"doctor.py: error: {in_one_line(error)}", file=sys.stderr)
        return 2
    return 0 if summary["healthy"] else 1
