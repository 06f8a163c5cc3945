"""Trains the VAE of the pocket FLUX on pictures of the pocket world.

Renders the pictures that the base needs as well (kept in RUN_DIR/pictures), trains an AutoencoderKL on scenes and
panels cut from them, and measures the shift and scale that bring its latents to mean 0 and standard deviation 1. The
result is RUN_DIR/export, an ordinary diffusers VAE folder. A run that was stopped goes on when it is started again.
Started by `torchrun --nproc-per-node N`, N processes train on a batch each and average their gradients.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import GOES_ON, command


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of pictures, checkpoints and export")
    parser.add_argument("--max-minutes", type=float, help="length of the training; the learning rate decays to its end")
    parser.add_argument("--steps", type=int, help="the same, in steps")
    parser.add_argument("--batch-size", type=int, default=16, help="scenes per step, or a quarter of the panels")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the pictures to render; less for a trial")
    parser.add_argument("--twins-share", type=float, default=0.0, help="of the scenes of two or more subjects, those of one class alone")
    parser.add_argument(
        "--mixed-share", type=float, default=0.0, help="of those of three or more, those with a class repeated beside another"
    )
    parser.add_argument("--pixels", type=int, choices=(64, 128), default=64, help="side of a scene; 8 x 8 tokens either way")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes that render; 0 uses the pictures there are")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


@command(GOES_ON)
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(argv)
    from scripts.pocket.train_vae import run  # torch and the like only once the arguments stand

    run(arguments)


if __name__ == "__main__":
    sys.exit(main())
