"""Train the identity judge on endless random scenes; run again to resume.

python scripts/train_pocket_judge.py --run-dir runs/judge
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import GOES_ON, command


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/pocket_judge"), help="checkpoints; run again to resume")
    parser.add_argument("--output", type=Path, help="where the weights go (default: in the place of the shipped ones)")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint-every", type=int, default=200)
    parser.add_argument("--test-scenes", type=int, default=200, help="scenes per number of subjects")
    return parser.parse_args(argv)


@command(GOES_ON)
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(argv)
    from scripts.pocket.train_judge import run  # torch and the like only once the arguments stand

    run(arguments)


if __name__ == "__main__":
    sys.exit(main())
