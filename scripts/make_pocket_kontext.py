"""Trains the pocket Kontext: an editing LoRA of the pocket FLUX, by which a posed cut-out becomes the subject's reference.

Scenes of the training split are drawn, their subjects cut out as a segmenter would and encoded once; the LoRA is trained on one CPU thread,
then measured on held-out identities. A command that was stopped goes on when it is started again, with at most 100 steps lost.
OUTPUT/kontext holds the LoRA as diffusers' pipelines load it, and what was done and measured.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import GOES_ON, command


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the LoRA and of all that leads to it")
    parser.add_argument("--num-scenes", type=int, default=4000, help="drawn for the training, of one to six subjects each")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--test-scenes", type=int, default=50, help="held-out scenes per number of subjects, one to four")
    parser.add_argument("--test-steps", type=int, nargs="+", default=[4, 8, 20], help="sampling steps that are measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


@command(GOES_ON)
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(argv)
    for name in ("num_scenes", "steps", "batch_size", "rank", "test_scenes", "threads"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}.")
    if min(arguments.test_steps) < 1:
        raise ValueError(f"--test-steps must be at least 1, got {min(arguments.test_steps)}.")
    from scripts.pocket.train_kontext import run  # torch and the like only once the arguments stand

    run(arguments)


if __name__ == "__main__":
    sys.exit(main())
