"""Trains the pocket FLUX from scratch as a text-to-image model of the pocket world: transformer and both text encoders.

Takes the pictures and the VAE that `scripts/train_pocket_vae.py` left in VAE_DIR, encodes the pictures once (kept in
RUN_DIR/tokens), and trains by flow matching on scenes, sheets and strips (`scripts.pocket.base_data`), so that the
model learns to look sideways: panels and scene of a sheet show the same subjects and are denoised together. There are
no reference branches here. A run that was stopped goes on when it is started again; `--export FOLDER` writes the
averaged weights of the latest checkpoint as a diffusers folder and ends, also while a run is going on. Started by
`torchrun --nproc-per-node N`, N processes share each batch and average their gradients: on a busy CPU, several
processes of one thread each get much further than one process of several threads.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import GOES_ON, command


def run_arguments(description: str) -> argparse.ArgumentParser:
    """The flags that every training of the base has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of tokens, checkpoints, samples, export")
    parser.add_argument("--max-minutes", type=float, help="length of the training; the learning rate decays to its end")
    parser.add_argument("--steps", type=int, help="the same, in steps")
    parser.add_argument("--stop-at", help="the same, as a clock time HH:MM")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=300, help="steps")
    parser.add_argument("--decay-from", type=float, default=0.4, help="share of the run after which the rate decays")
    parser.add_argument("--sheets-share", type=float, help="of the batches, those of sheets and strips (default: 0.4; 0: none)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks (needs a C++ compiler)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this script."""
    parser = run_arguments(__doc__)
    parser.add_argument("--vae-dir", type=Path, help="run folder of scripts/train_pocket_vae.py")
    parser.add_argument("--start-from", type=Path, help="diffusers folder of a pocket FLUX whose weights a new run starts from")
    parser.add_argument("--export", type=Path, help="write the latest checkpoint here as a diffusers folder, and end")
    return parser.parse_args(argv)


@command(GOES_ON)
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(argv)
    from scripts.pocket.train_base import run  # torch and the like only once the arguments stand

    run(arguments)


if __name__ == "__main__":
    sys.exit(main())
