"""Makes better pocket weights in a given time: a base, guidance distilled into it, a reference adapter, and their measures.

One command for a GPU, on which 8 minutes do what took two CPU cores days; the same code runs on a CPU. Its stages are the commands of
docs/pocket_world.md in their order: pictures of the world are drawn by all cores, encoded once, the base is trained on them, guidance is
distilled into it, the adapter is trained with cached latents while its data are drawn beside, and both are measured on held-out
identities. The time is shared out among the stages; what one does not need falls to those after it. A command that was stopped goes on when
it is started again. OUTPUT/flux and OUTPUT/lora.safetensors are the weights, OUTPUT/evaluation.json their measures, OUTPUT/weights.json
says what was done in how many seconds.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import GOES_ON, command
from scripts.pocket.stages import SHARES


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the weights and of all that leads to them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all stages together")
    parser.add_argument("--size", choices=("tiny", "full"), default="full", help="tiny: two steps of everything, a trial of the machine")
    parser.add_argument(
        "--pixels", type=int, choices=(64, 128), default=64, help="side of a scene; 128 has a VAE of its own, trained first"
    )
    parser.add_argument("--from-scratch", action="store_true", help="fresh weights instead of the shipped ones; at 128 px always")
    parser.add_argument("--twins-share", type=float, default=0.25, help="of the scenes of two or more subjects, those of one class alone")
    parser.add_argument(
        "--mixed-share", type=float, default=0.15, help="of those of three or more, those with a class repeated beside another"
    )
    parser.add_argument(
        "--sheets-share",
        type=float,
        help="of the base's batches, those of sheets and strips, on which one individual stands several times (default: 0.4; 0: none)",
    )
    parser.add_argument("--batch-size", type=int, help="of the base (default: 1024 on a GPU, 32 on a CPU); a quarter of it for the adapter")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the base")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the base's blocks on a GPU")
    parser.add_argument("--workers", type=int, help="processes that draw and load data (default: one per core)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--until", choices=tuple(SHARES), default="evaluation", help="last stage; the time is shared out among those up to it"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


@command(GOES_ON)
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(argv)
    if not arguments.minutes > 0:
        raise ValueError(f"--minutes must be more than 0, got {arguments.minutes:g}.")
    if arguments.batch_size is not None and arguments.batch_size < 4:
        raise ValueError(f"--batch-size must be at least 4, got {arguments.batch_size}.")
    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {arguments.workers}.")
    from scripts.pocket.weights import run  # torch and the like only once the arguments stand

    run(arguments)


if __name__ == "__main__":
    sys.exit(main())
