"""What constructed data are worth in the pocket world, where the exact ones are known: traces every stage, trains on both, and compares.

python preprocess/construct.py configs/construct_pocket.json --output data/constructed
python scripts/construction_worth.py --constructed data/constructed --output outputs/construction_worth

Three data sets of as many samples: the constructed one; one of which only the pictures are exact, drawings of the world from which
stages 3 to 5 make all the rest; and the exact one. Start the same command again after an interruption; it goes on.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import GOES_ON, command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constructed", type=Path, required=True, help="OUTPUT of preprocess/construct.py")
    parser.add_argument("--config", default="configs/construct_pocket.json", help="with which it was constructed (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="as it was constructed; repeatable")
    parser.add_argument("--output", type=Path, default=Path("outputs/construction_worth"))
    parser.add_argument("--drawings", type=int, default=4, help="candidates per sample that are drawn where the pictures are exact")
    parser.add_argument("--steps", type=int, default=1500, help="of each training")
    parser.add_argument("--seeds", type=int, default=2, help="trainings per data set")
    parser.add_argument("--cases", type=int, default=80, help="held-out scenes per number of references on which they are measured")
    cores = os.cpu_count() or 1
    parser.add_argument("--parallel", type=int, default=min(2, cores), help="runs side by side, of one thread each (here: %(default)s)")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the tables into this page, too")
    return parser.parse_args(argv)


@command(GOES_ON)
def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0 done, 1 something failed."""
    arguments = parse_arguments(argv)
    for name, least in (("drawings", 1), ("steps", 1), ("seeds", 1), ("cases", 2), ("parallel", 1)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(arguments, name)}.")
    from scripts.construction.running import run  # torch and the like only once the arguments stand

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
