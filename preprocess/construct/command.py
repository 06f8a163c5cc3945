"""Training data from nothing: accelerate launch preprocess/construct.py CONFIG --output DIR

Stages 1 to 6: prompts, pictures, masks, references, correspondences, and the data set (docs/construct.md). What is computed is kept in
DIR/work, what passes the config's limits goes into DIR/dataset, and DIR/report/index.html shows what each limit cost. An interrupted run
goes on when started again, with other limits, too; plain `python preprocess/construct.py` runs one process. Neither the number of processes
nor interruptions change the data set.
"""

import argparse
from pathlib import Path

from mosaic.commands import GOES_ON, command

LAST = 6


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="such as configs/construct_pocket.json")
    parser.add_argument("--output", type=Path, required=True, help="folder of the work, the data set and the page")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="setting of the config, such as num_samples=300"
    )
    parser.add_argument(
        "--stages", type=parse_stages, default=(1, LAST), metavar="FIRST-LAST", help="only these, such as 1-3 or 4 (default: 1-6)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what it would cost, by stage, and which models it needs")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU of its own for each process if there is one)")
    return parser.parse_args(argv)


def parse_stages(text: str) -> tuple[int, int]:
    """Read "1-3" or "4" as the first and the last stage."""
    ends = text.split("-")
    if len(ends) > 2 or not all(end.isdecimal() for end in ends) or not 1 <= int(ends[0]) <= int(ends[-1]) <= LAST:
        raise argparse.ArgumentTypeError(f"must be a stage of 1 to {LAST}, or the first and the last of some, such as 1-3, got {text}")
    return int(ends[0]), int(ends[-1])


@command(GOES_ON)
def main(argv: list[str] | None = None) -> int:
    """Command line."""
    arguments = parse_arguments(argv)
    from preprocess.construct.run import run  # torch and the like only once the arguments stand

    return run(arguments)
