"""Find the correspondences of a data set: accelerate launch preprocess/match.py --data DIR --extractors dift,dinov2

Reads a data set in the multi-reference format (preprocess/FORMAT.md) and writes the points files its manifest names; the manifest stays as
it is. Every process takes its own share of the samples; finished samples are skipped, so an interrupted run goes on when started again.
Plain `python preprocess/match.py` runs one process. Neither the number of processes nor interruptions change the results.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import GOES_ON, command
from preprocess.extractors.arguments import add_extractor_arguments


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line. Flags of matching have no default here: `MatchingSettings` has it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--split", default="train", help="split to match (default: train)")
    parser.add_argument("--limit", type=int, help="match only the first samples of the split")
    parser.add_argument("--output", type=Path, help="folder for the results instead of the data set's own")
    parser.add_argument("--layout", choices=("compact", "release"), default="compact", help="points files, or released coordinate files")
    parser.add_argument("--contact-sheet", type=int, default=0, metavar="N", help="draw N samples with correspondence lines as a PNG")
    add_extractor_arguments(parser, "dift,dinov2")
    group = parser.add_argument_group("matching", argument_default=argparse.SUPPRESS)
    group.add_argument("--score", choices=("cosine", "dot"), help="dot: raw dot product, as in the release (default: cosine)")
    group.add_argument("--consensus", type=int, metavar="CELLS", help="tolerance between extractors; 0: exact equality (default: 1)")
    group.add_argument(
        "--cycle", type=int, metavar="CELLS", help="largest miss on the way there and back; 0: mutual nearest (default: off)"
    )
    group.add_argument("--affine", type=int, metavar="CELLS", help="largest miss of the affine map that most matches follow (default: off)")
    group.add_argument("--min-similarity", type=float, metavar="COSINE", help="least cosine of a match (default: off)")
    group.add_argument("--min-margin", type=float, metavar="COSINE", help="least lead over the best distant cell (default: off)")
    group.add_argument("--soft-argmax", type=int, metavar="CELLS", help="refine u in a window of this radius (default: off)")
    group.add_argument("--temperature", type=float, help="of the refinement (default: 0.02)")
    group.add_argument(
        "--white-threshold", type=int, metavar="LEVELS", help="reference pixels this near to white are background (default: 5)"
    )
    group.add_argument(
        "--whole-references", dest="white_threshold", action="store_const", const=None, help="near-white pixels are no background"
    )
    group.add_argument("--background", choices=("keep", "black"), help="what extractors see outside the masks (default: keep)")
    group.add_argument("--unique-u", action="store_true", help="one point per reference cell")
    group.add_argument(
        "--grid", type=parse_grid, metavar="ROWSxCOLUMNS", help="match on this grid, then vote (default: the manifest's grids)"
    )
    group.add_argument("--chunk-size", type=int, metavar="CELLS", help="target cells held in memory at a time (default: 1024)")
    group.add_argument("--seed", type=int, help="of the extractors' noise (default: 0)")
    return parser.parse_args(argv)


def parse_grid(text: str) -> list[int]:
    """Read "64x64" as rows and columns."""
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"must be rows and columns such as 64x64, got {text}")
    return [int(side) for side in sides]


@command(GOES_ON)
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(argv)
    from preprocess.matching.run import run  # torch and the like only once the arguments stand

    run(arguments)


if __name__ == "__main__":
    sys.exit(main())
