"""Measure extractors and filters where every correspondence is known: python preprocess/evaluate_matching.py --data data/pocket

The data set's own points must be exact, as those of scripts/make_pocket_world.py are. Prints Markdown tables: PCK per extractor, with and
without soft-argmax, precision and recall of each filter, and what the doctor's figures (coherence, coverage, cyclic, agreement) are for
exact, spoilt and matched points. A match is correct if it lies within 0.1 of the subject's box (PCK@0.1);
recall counts all true correspondences. --sweep compares settings of an extractor; --benchmark measures time and memory of matching instead.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import NOTHING, command
from preprocess.extractors.arguments import add_extractor_arguments


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of a data set with exact points")
    parser.add_argument("--split", default="train")
    parser.add_argument("--limit", type=int, help="use only the first samples of the split")
    parser.add_argument("--output", type=Path, help="also write the numbers as JSON")
    parser.add_argument("--benchmark", action="store_true", help="measure time and memory of matching on random features instead")
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 128], help="cells per side of the benchmark's grids")
    parser.add_argument("--channels", type=int, default=1280, help="channels of the benchmark's features (default: 1280, those of DIFT)")
    parser.add_argument("--repeats", type=int, default=3, help="runs per grid of the benchmark")
    add_extractor_arguments(parser, "pixels,vae")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="EXTRACTOR.OPTION=VALUE,VALUE",
        help="measure each extractor alone, with each of these values (several options: every combination), in one short table",
    )
    return parser.parse_args(argv)


@command(NOTHING)
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(argv)
    from preprocess.matching.evaluation import run  # torch and the like only once the arguments stand

    run(arguments)


if __name__ == "__main__":
    sys.exit(main())
