"""Measure the shipped adapters of the ablation again, on this machine, against their rows: `python scripts/ablation_check.py`.

Each adapter of ARMS is that of an arm at seed 0, in half precision. Its shares must lie within the 95 % intervals that RESULTS has for
that run. Exit code 0: all do; 1: some do not; 2: something is missing. Finished measurements are left alone when it is started again.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import GOES_ON, command
from scripts.ablation.arms import ARMS_FOLDER

RESULTS = Path(__file__).resolve().parents[1] / "assets/ablation/results.json"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="results.json of the ablation (assets/ablation/results.json)")
    parser.add_argument("--arms", type=Path, default=ARMS_FOLDER, help="folder of its adapters (assets/pocket/arms)")
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 2, 4], help="numbers of references (default: 1 2 4)")
    parser.add_argument("--output", type=Path, default=Path("outputs/ablation_check"))
    return parser.parse_args(argv)


@command(GOES_ON)
def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = parse_arguments(argv)
    from scripts.ablation.check import run  # torch and the like only once the arguments stand

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
