"""A fair trial for the losses: train and measure the arms in the pocket world, then draw tables and figures.

python scripts/ablation.py --short          # coarse, the same code path
python scripts/ablation.py --long --output outputs/trial

Every training is an ordinary `train.sh` run of a config file that this writes to OUTPUT/configs. Start the same command again after an
interruption: finished trainings and measurements are known by their digests and left alone, others go on from their checkpoints.
"""

import argparse
import os
from pathlib import Path

from mosaic.commands import GOES_ON, command
from scripts.ablation.arms import ARMS_FOLDER, DEFAULT_PARTS


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--short", dest="size", action="store_const", const="short", help="coarse, to see that all of it works (the default)")
    size.add_argument("--long", dest="size", action="store_const", const="long", help="the trial of docs/ablation.md: days on two cores")
    parser.set_defaults(size="short")
    parser.add_argument("--output", type=Path, default=Path("outputs/ablation"))
    parser.add_argument(
        "--base", help="folder of another base, such as OUTPUT/flux of scripts/make_pocket_weights.py; with its own --output"
    )
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--parallel", type=int, default=min(2, cores), help="runs side by side, of one thread each (default here: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, help="training seeds per arm from scratch")
    parser.add_argument("--late-seeds", type=int, help="training seeds per late start")
    parser.add_argument("--steps", type=int, help="optimizer steps from scratch")
    parser.add_argument("--every", type=int, help="of them between two checkpoints that are measured")
    parser.add_argument("--late-from", type=int, help="step of flow matching's run that late starts start from")
    parser.add_argument("--late-steps", type=int, help="optimizer steps of a late start")
    parser.add_argument("--selection-steps", type=int, help="optimizer steps of those that settings are chosen by")
    parser.add_argument("--batch-size", type=int, help="samples per step")
    parser.add_argument("--train-samples", type=int, help="scenes to train on")
    parser.add_argument("--cases", type=int, help="held-out scenes per regime and K at the end of a run")
    parser.add_argument("--checkpoint-cases", type=int, help="held-out scenes per regime and K before it, and for interventions")
    parser.add_argument("--real-scenes", type=int, help="real renderings per regime and K, to which pictures are compared")
    parser.add_argument("--inference-steps", type=int, help="sampling steps")
    parser.add_argument(
        "--parts", nargs="+", choices=(*DEFAULT_PARTS, "binding"), default=list(DEFAULT_PARTS), help="default: all but binding"
    )
    parser.add_argument("--confirm", metavar="ARM", help="also the confirmation of this late arm, on seeds and scenes of its own")
    parser.add_argument("--arms", nargs="+", default=[], help="only these arms, by name")
    parser.add_argument("--list", action="store_true", help="write the config files, list runs and what is left to do, compute nothing")
    parser.add_argument(
        "--export-arms",
        type=Path,
        nargs="?",
        const=ARMS_FOLDER,
        help="write the arms' adapters (their first seed) to a folder (assets/pocket/arms)",
    )
    return parser.parse_args(argv)


@command(GOES_ON)
def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0 done, 1 something failed, 2 wrong command, 130 interrupted."""
    arguments = parse_arguments(argv)
    from scripts.ablation.running import run  # torch and the like only once the arguments stand

    return run(arguments)
