"""Distils text guidance into the pocket FLUX, as FLUX.1-dev has it: one pass with an embedded guidance scale stands for two.

The teacher is a pocket FLUX without guidance embedding (`scripts/train_pocket_base.py`). The student starts from its weights, with a
guidance embedding that starts at zero. For a guidance g, drawn per sample, it learns u + g (v - u), where v is the velocity with the
caption and u that with the empty one: v + (g - 1) (v - u), of which the first v is the data's own, so that the student goes on learning
from pictures, and the difference is the teacher's. At g = 1 that is plain flow matching, and there reference adapters train. The text
encoders stay the teacher's. RUN_DIR is that of the teacher's training, for its tokens; checkpoints, samples and the export are in
RUN_DIR/distilled. A run that was stopped goes on when it is started again; `torchrun --nproc-per-node N` as there.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import GOES_ON, command
from scripts.train_pocket_base import run_arguments


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this script."""
    parser = run_arguments(__doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="diffusers folder of a pocket FLUX without guidance embedding")
    return parser.parse_args(argv)


@command(GOES_ON)
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(argv)
    from scripts.pocket.distill_base import run  # torch and the like only once the arguments stand

    run(arguments)


if __name__ == "__main__":
    sys.exit(main())
