"""Convert a data set into the multi-reference format (preprocess/FORMAT.md).

python preprocess/convert.py folder   SRC DEST    one folder per sample: target.png, ref_*.png, prompt.txt; or pictures with captions
python preprocess/convert.py uno      SRC DEST    UNO-style JSON list
python preprocess/convert.py musar    SRC DEST    MUSAR-Gen-style Parquet
python preprocess/convert.py mapped   SRC DEST    a JSON list, JSON Lines or Parquet of any columns, by --mapping
python preprocess/convert.py semalign SRC DEST    SemAlign-MS-Subjects200K as released
python preprocess/convert.py repository SRC DEST  a data set of our format on the Hugging Face hub, or a folder of its layout
"""

import argparse
import hashlib
import importlib
import inspect
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import NOTHING, command
from mosaic.config.loading import load_config
from mosaic.data import SampleRecord
from mosaic.locks import new_folder
from preprocess.sources import flat
from preprocess.sources.invalid import InvalidSamples
from preprocess.sources.mapping import Mapping, load_mapping, ready

SOURCES = {
    "folder": "one folder per sample: target.png, ref_*.png, prompt.txt (mask_*.png if known); or pictures with captions",
    "uno": "UNO-style JSON list of prompt, image_paths (or image_path), image_tgt_path",
    "musar": "MUSAR-Gen-style Parquet: tgt_img, prompt, cond_img_k, cond_prompt_k",
    "mapped": "a JSON list, JSON Lines or Parquet of any columns: a mapping says which is what",
    "semalign": "SemAlign-MS-Subjects200K as released, with its points",
    "repository": "a data set of our format on the Hugging Face hub, or a folder of its layout; splits are kept",
}


@command(NOTHING)
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    is_flat = args.source == "folder" and flat.is_flat(args.src)
    written, problems = prepare(args) if is_flat else convert(args)
    left_out = f"; {problems} left out, listed in {invalid_list(args.dest)}" if problems else ""
    print(f"wrote {written} {'sample folders' if is_flat else 'samples'} to {args.dest}{left_out}")
    if is_flat:
        print(flat.what_is_missing(args.dest))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="source", required=True)
    for name, text in SOURCES.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("src", type=Path, metavar="SRC", help="what to convert")
        command.add_argument("dest", type=Path, metavar="DEST", help="folder to create")
        if name != "repository":
            command.add_argument("--split", default="train", help="split of the samples (default: train)")
        command.add_argument("--heldout-share", type=float, default=0.0, help="share of samples, drawn by id, for the split heldout")
        command.add_argument("--pictures", choices=("given", "png"), default="given", help="copy picture files, or store all as PNG")
        command.add_argument("--limit", type=int, help="stop after this many samples")
        command.add_argument("--skip-invalid", action="store_true", help="leave out, count and list samples that do not convert")
        if name not in ("semalign", "repository"):
            command.add_argument(
                "--config", help="config of the training that is planned, whose sizes decide how fine the points' grids are"
            )
            command.add_argument("--grid", type=int, help="cells per side of the points' grids instead (default: 64, enough up to 1024 px)")
        if name == "mapped":
            command.add_argument("--mapping", required=True, help=f"a mapping file, or one of {', '.join(ready())}")
        elif name in ready():
            command.set_defaults(mapping=name)
        if name == "mapped" or name in ready():
            command.add_argument("--image-root", type=Path, help="folder that the list's paths are relative to (default: that of SRC)")
    args = parser.parse_args(argv)
    if not 0 <= args.heldout_share < 1:
        parser.error(f"--heldout-share must be at least 0 and less than 1, got {args.heldout_share}")
    for name in ("grid", "limit"):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if getattr(args, "grid", None) is not None and args.config is not None:
        parser.error("--config and --grid must not be given both: the config's sizes decide the grid")
    return args


def convert(args: argparse.Namespace) -> tuple[int, int]:
    """Convert as the command line says; returns how many samples were written and how many left out.

    Raises:
        FileExistsError: DEST exists.
        FileNotFoundError, OSError, ValueError: SRC is not what its name says, no sample could be converted, or one is invalid and not
            skipped; or the config cannot be read.
    """
    from mosaic.data import DatasetWriter  # and with it torch

    mapping = load_mapping(args.mapping) if hasattr(args, "mapping") else None
    if hasattr(args, "grid"):
        args.grid = chosen_grid(args)
    invalid = InvalidSamples(args.skip_invalid)
    written = 0
    with DatasetWriter(args.dest, args.pictures) as writer:
        source = importlib.import_module(
            f"preprocess.sources.{'mapped' if mapping else args.source}"
        )  # its packages are needed by this command alone
        total = source.count(args.src) if hasattr(source, "count") else None
        total = min(filter(None, (total, args.limit)), default=None)
        for sample in tqdm(read(source, args, invalid, mapping), desc="converting", unit="sample", total=total):
            with invalid.at(f"{args.src}, sample {sample.id}"):
                writer.add(replace(sample, split=split_of(sample, args)))
                written += 1
            if written == args.limit:
                break
        if not written:
            raise ValueError(f"{args.src}: no sample could be converted ({len(invalid.problems)} are invalid).")
        for line in writer.remarks():
            print(f"note: {line}", file=sys.stderr)
        if invalid.problems:
            invalid.write(invalid_list(args.dest))
    return written, len(invalid.problems)


def chosen_grid(args: argparse.Namespace) -> int:
    """Cells per side of the points' grids.

    Raises:
        FileNotFoundError, OSError, ValueError: The config, or the model that it names, cannot be read.
    """
    from preprocess.sources.sizes import DEFAULT_GRID, grid_of

    if args.config is None:
        return args.grid or DEFAULT_GRID
    grid = grid_of(load_config(args.config))
    logging.info("%s: points get grids of about %d x %d cells", args.config, grid, grid)
    return grid


def prepare(args: argparse.Namespace) -> tuple[int, int]:
    """Make sample folders, which lack their references, of a flat folder; returns how many were written and what was left out.

    Raises:
        FileExistsError: DEST exists.
        FileNotFoundError, ValueError: No picture could be taken, or one is invalid and not skipped.
    """
    invalid = InvalidSamples(args.skip_invalid)
    with new_folder(args.dest, "folder") as aside:
        written = flat.write_sample_folders(args.src, aside, invalid, args.limit)
        if not written:
            raise ValueError(f"{args.src}: no picture could be taken ({len(invalid.problems)} are invalid).")
        if invalid.problems:
            invalid.write(invalid_list(args.dest))
    return written, len(invalid.problems)


def read(source: ModuleType, args: argparse.Namespace, invalid: InvalidSamples, mapping: Mapping | None) -> Iterator[SampleRecord]:
    """The samples of a source, which gets those of the options that it knows."""
    options = {
        "invalid": invalid,
        "mapping": mapping,
        "split": getattr(args, "split", None),
        "grid": getattr(args, "grid", None),
        "image_root": getattr(args, "image_root", None),
    }
    known = inspect.signature(source.samples).parameters
    return source.samples(args.src, **{name: value for name, value in options.items() if name in known})


def split_of(sample: SampleRecord, args: argparse.Namespace) -> str:
    """The split of a sample: a share of them, drawn by id and so the same in every run, is held out."""
    drawn = int.from_bytes(hashlib.sha256(sample.id.encode()).digest()[:8], "big") / 2**64
    return "heldout" if drawn < args.heldout_share else sample.split


def invalid_list(dest: Path) -> Path:
    """The file that lists the samples left out, beside DEST."""
    return dest.with_name(dest.name + ".invalid.txt")


if __name__ == "__main__":
    sys.exit(main())
