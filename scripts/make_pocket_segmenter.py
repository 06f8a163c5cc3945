"""Trains the segmenter of the pocket world: a CLIPSeg of transformers' class at toy size, asked for classes in words.

Scenes of the training split are drawn once, with their exact masks, and once more by the pocket FLUX from their noised latents, since
what that generates is what the segmenter is for. It is trained on one CPU thread in half an hour, then measured on held-out identities. A
command that was stopped goes on when it is started again, with at most 100 steps lost. OUTPUT/segmenter is a folder as the Hub has them,
OUTPUT/segmenter.json says what was done and measured.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import GOES_ON, command


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the segmenter and of all that leads to it")
    parser.add_argument("--num-scenes", type=int, default=6500, help="drawn for the training")
    parser.add_argument("--tower-steps", type=int, default=3000, help="in which the picture tower learns classes")
    parser.add_argument("--decoder-steps", type=int, default=1000, help="in which the decoder learns to answer phrases")
    parser.add_argument("--batch-size", type=int, default=48, help="scenes per step; one phrase is asked of each")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the tower; twice as much of the decoder")
    parser.add_argument("--test-scenes", type=int, default=100, help="held-out scenes per number of subjects")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


@command(GOES_ON)
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(argv)
    for name in ("tower_steps", "decoder_steps", "batch_size", "test_scenes", "threads"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}.")
    if arguments.num_scenes < arguments.batch_size:
        raise ValueError(f"--num-scenes must be at least --batch-size {arguments.batch_size}, got {arguments.num_scenes}.")
    from scripts.pocket.train_segmenter import run  # torch and the like only once the arguments stand

    run(arguments)


if __name__ == "__main__":
    sys.exit(main())
