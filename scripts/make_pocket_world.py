"""Write scenes of the pocket world as a multi-reference dataset (preprocess/FORMAT.md).

python scripts/make_pocket_world.py --output data/pocket --num-samples 20000 --num-heldout 400
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import NOTHING, command
from scripts.pocket import world

FIRST_SEED = 200_000_000  # far from the scenes on which the base was trained, and from those of the judge, the evaluation and the examples


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--num-samples", type=int, default=1000, help="training scenes")
    parser.add_argument("--num-heldout", type=int, default=0, help="scenes of identities that training never sees")
    parser.add_argument("--max-subjects", type=int, default=4, help="scenes hold 1 to this many subjects (at most 6)")
    parser.add_argument("--twins-share", type=float, default=0.0, help="of the scenes of two or more subjects, those of one class alone")
    parser.add_argument(
        "--mixed-share", type=float, default=0.0, help="of those of three or more, those with a class repeated beside another"
    )
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help="of the first scene; scene i has seed + i")
    parser.add_argument("--scene-size", type=int, default=64, help="px")
    parser.add_argument("--reference-size", type=int, default=world.REFERENCE_SIZE, help="px")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw; the data set is the same")
    parser.add_argument("--folders", action="store_true", help="write plain folders of pictures, without points, for preprocess/")
    return parser.parse_args(argv)


@command(NOTHING)
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(argv)
    from scripts.pocket.dataset import run  # torch and the like only once the arguments stand

    run(arguments)


if __name__ == "__main__":
    sys.exit(main())
