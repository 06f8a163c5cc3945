"""Draw the tables and figures of an ablation from its results file: `python scripts/ablation_figures.py outputs/ablation/results.json`.

Writes report.md with all tables, the figures beside it as SVG and PNG, each number of which is in the results file next to its run.
With --readme FILE the main ones also go into that file, between its two lines "<!-- trial -->".
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of scripts/ablation.py")
    parser.add_argument("--output", type=Path, help="folder of the report (default: report, beside the results)")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the main tables and figures into this page, too")
    return parser.parse_args(argv)


@command("the report may be half written; start again")
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(argv)
    from scripts.ablation.figures import run  # torch and the like only once the arguments stand

    run(arguments)


if __name__ == "__main__":
    sys.exit(main())
