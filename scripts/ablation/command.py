"""The paper's claims in miniature: train and measure all arms of the ablation in the pocket world, then draw its tables and figures.

python scripts/ablation.py --short          # coarse, the same code path
python scripts/ablation.py --long --parallel 2

Every training is an ordinary `train.sh` run of a config file that this writes to OUTPUT/configs. Start the same command again after an
interruption: finished trainings and measurements are known by their digests and left alone, others go on from their checkpoints.
"""

import argparse
import os
from pathlib import Path

from mosaic.commands import GOES_ON, command
from scripts.ablation.arms import ARMS_FOLDER, PARTS


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--short", dest="size", action="store_const", const="short", help="coarse, to see that all of it works (the default)")
    size.add_argument("--long", dest="size", action="store_const", const="long", help="that of docs/ablation.md: an afternoon on two cores")
    parser.set_defaults(size="short")
    parser.add_argument("--output", type=Path, default=Path("outputs/ablation"))
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--parallel", type=int, default=min(2, cores), help="runs side by side, which share the cores (default here: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, help="training seeds per arm")
    parser.add_argument("--factor-seeds", type=int, help="training seeds per one-factor variant")
    parser.add_argument("--steps", type=int, help="optimizer steps per arm")
    parser.add_argument("--factor-steps", type=int, help="optimizer steps per one-factor variant")
    parser.add_argument("--batch-size", type=int, help="samples per step")
    parser.add_argument("--train-samples", type=int, help="scenes to train on")
    parser.add_argument("--cases", type=int, help="held-out scenes per K")
    parser.add_argument("--real-scenes", type=int, help="real renderings per K, to which pictures are compared")
    parser.add_argument("--inference-steps", type=int, help="sampling steps")
    parser.add_argument("--ks", type=int, nargs="+", help="numbers of references")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--arms", nargs="+", default=[], help="only these arms and variants, by name")
    parser.add_argument("--list", action="store_true", help="write the config files, list runs and what is left to do, compute nothing")
    parser.add_argument(
        "--export-arms",
        type=Path,
        nargs="?",
        const=ARMS_FOLDER,
        help="write the main arms' adapters (seed 0) to a folder (assets/pocket/arms)",
    )
    return parser.parse_args(argv)


@command(GOES_ON)
def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0 done, 1 something failed, 2 wrong command, 130 interrupted."""
    arguments = parse_arguments(argv)
    from scripts.ablation.running import run  # torch and the like only once the arguments stand

    return run(arguments)
