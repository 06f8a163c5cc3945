"""What scripts/doctor.py does: open a data set, look at its samples, print and write the findings."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from mosaic.config.loading import Config, DataConfig, load_config
from mosaic.data import Inspection, MultiReferenceDataset, TrainingDataset, open_dataset
from mosaic.data.inspection import spread_evenly
from mosaic.data.multi_reference.repository import hub_id, parquet_columns
from mosaic.data.readable import Attempt, Unreadable
from mosaic.data.workers import loaded
from mosaic.files import read_json, require_file, write_text
from mosaic.method.grids import PATCH, token_grid
from mosaic.pipeline.prompt_lengths import TextWindow
from mosaic.weights.digests import vae_scale_factor
from scripts.doctor.comparison import Compared
from scripts.doctor.findings import Findings, Training, summarise
from scripts.doctor.matches import Matches
from scripts.doctor.page import Sheet, write_findings
from scripts.doctor.wording import LOOK, rows

FLUX_TOKEN = 16  # px per side


def planned(args: argparse.Namespace) -> tuple[Config, int]:
    """The training that is planned, and the pixels of its tokens: what a config says, or the defaults of FLUX.1; flags win.

    Raises:
        FileNotFoundError, OSError, ValueError: The config, or the VAE's config of the model that it names, cannot be read.
    """
    config = Config() if args.config is None else load_config(args.config)
    given = {
        "split": args.split,
        "image_size": None if args.image_size is None else (args.image_size, args.image_size),
        "buckets": None if args.image_size is None else (),
        "reference_size": args.reference_size,
        "min_point_coverage": args.min_coverage,
        "max_points_outside": args.max_outside,
    }
    data = config.data.replace(root=args.data, **{name: value for name, value in given.items() if value is not None})
    model = config.model if args.text_length is None else config.model.replace(text_length=args.text_length)
    own = FLUX_TOKEN if args.config is None or args.token_size is not None else PATCH * vae_scale_factor(model.pretrained)
    return config.replace(data=data, model=model), args.token_size or own


def open_data(args: argparse.Namespace, settings: DataConfig, token_size: int) -> TrainingDataset:
    """The data set, its layout told by `dataset.json` or the column `references`, which only our format has."""
    is_ours = "://" in args.data or (Path(args.data) / "dataset.json").exists() or "references" in parquet_columns(Path(args.data))
    layout: Literal["multi_reference", "semalign"] = (
        "multi_reference" if is_ours or (not Path(args.data).exists() and hub_id(args.data)) else "semalign"
    )
    if layout == "semalign" and Path(args.data).is_dir() and not (Path(args.data) / "data").is_dir():
        raise FileNotFoundError(
            f"{args.data}: holds neither dataset.json (multi-reference format) nor a folder data with Parquet files (SemAlign layout)."
        )
    data = settings.replace(format=layout)
    target = token_grid(*data.image_size, token_size // PATCH, "--image-size")
    reference = token_grid(data.reference_size, data.reference_size, token_size // PATCH, "--reference-size")
    return open_dataset(data, data.split, target, reference)


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
    yield from tqdm(loaded(loader), "looking at samples", len(chosen), unit="sample", disable=not sys.stderr.isatty())


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
    """Look, print and write; returns the exit code.

    Raises:
        FileNotFoundError, OSError, ValueError: The data cannot be read as a whole, or a file cannot be written.
    """
    require_file(args.json, "--json")
    require_file(args.html, "--html")
    config, token_size = planned(args)
    data = config.data
    dataset = open_data(args, data, token_size)
    training = Training(
        token_size, data.image_size, data.reference_size, config.model.text_length, data.min_point_coverage, data.max_points_outside
    )
    window = TextWindow.of_model(config.model.pretrained, config.model.text_length) if args.config else None
    findings, sheet = Findings(training, args.looked, matches=Matches(extractors_of(args.data)), window=window), Sheet()
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
    return 0 if summary["healthy"] else 1
