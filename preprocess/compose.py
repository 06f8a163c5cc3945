"""Make samples of K >= 2 references out of the single-subject samples of a data set: several of them as panels of one picture.

python preprocess/compose.py SRC DEST --num-samples 10000 --references 2,3,4 --seed 0 --size 1024

SRC and DEST are in the multi-reference format (preprocess/FORMAT.md). Points and masks are carried through exactly
(preprocess/composition.py); sample i depends on the seed, i and SRC only. SRC must be matched, or not matched at all.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import NOTHING, command
from preprocess.composition import LAYOUTS


@command(NOTHING)
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse(argv)
    from preprocess.composing import run  # torch and the like only once the arguments stand

    run(arguments)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", metavar="SRC", help="data set with single-subject samples: a folder, or a URL that fsspec knows")
    parser.add_argument("dest", type=Path, metavar="DEST", help="folder to create")
    parser.add_argument("--num-samples", type=int, required=True, help="samples to compose")
    parser.add_argument(
        "--references", type=_counts, default=(2, 3, 4), metavar="K,K,...", help="values of K, evenly drawn (default: 2,3,4)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--size", type=int, default=1024, help="largest side of the targets in px (default: 1024); panels are never enlarged"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="of the planned training: its tokenizer tells which captions it cuts (default: words are counted)"
    )
    parser.add_argument("--split", default="train", help="split of SRC to take, and of the result (default: train)")
    args = parser.parse_args(argv)
    for name, least in (("num_samples", 1), ("seed", 0), ("size", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    return args


def _counts(text: str) -> tuple[int, ...]:
    """Values of K."""
    values = tuple(int(part) if part.strip().isdigit() else 0 for part in text.split(","))
    if any(value not in LAYOUTS for value in values):
        raise argparse.ArgumentTypeError(f"must be numbers within {min(LAYOUTS)}..{max(LAYOUTS)}, separated by commas, got {text!r}")
    return values


if __name__ == "__main__":
    sys.exit(main())
