"""Kill a training run again and again, resume it each time, and compare it with one that ran through.

`python scripts/kill_test.py CONFIG [--set section.field=value ...] --output FOLDER [--kills 50]`

Each kill is a SIGKILL at a random moment: a random number of logged steps after the start plus a random part of a step; about every third
one waits for a checkpoint that is being written and hits that; about every tenth hits the start. The run goes on with --resume auto.
At the end the weights, the optimizer, the average and the log must be those of the uninterrupted run, bit for bit. Exit code 0: they are.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import command
from mosaic.config.loading import load_config


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="JSON file of the run")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override one setting; may be repeated")
    parser.add_argument("--output", type=Path, required=True, help="folder for both runs; must be empty or absent")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parser.parse_args(argv)


@command("both runs stay where they are; start again with another --output")
def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = parse_arguments(argv)
    if arguments.output.exists() and any(arguments.output.iterdir()):
        raise ValueError(f"--output {arguments.output}: must be empty or absent.")
    config = load_config(arguments.config, arguments.set)
    if config.training.max_steps is None:
        raise ValueError("training.max_steps must be given: the kills are spread over it.")
    from scripts.launching.kill_test import kill_test  # torch and the like only once the config stands

    report = kill_test(config, arguments.output, arguments.kills, random.Random(arguments.seed))
    print("\n".join(report.lines()))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
