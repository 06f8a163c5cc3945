"""Kill a training run again and again, resume it each time, and compare it with one that ran through.

`python scripts/kill_test.py CONFIG [--set section.field=value ...] --output FOLDER [--kills 50]`

Each kill is a SIGKILL at a random moment: a random number of logged steps after the start plus a random part of a step; about every third
one waits for a checkpoint that is being written and hits that; about every tenth hits the start. The run goes on with --resume auto.
At the end the weights, the optimizer, the average and the log must be those of the uninterrupted run, bit for bit. Exit code 0: they are.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="JSON file of the run")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override one setting; may be repeated")
    parser.add_argument("--output", type=Path, required=True, help="folder for both runs; must be empty or absent")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = parse_arguments(argv)
    from scripts.launching.kill_test import run  # torch and the like only once the arguments stand

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
