"""Measure what a list of tasks says: `python scripts/ablation_measure.py TASKS.json`; scripts/ablation.py writes the list and calls this.

Finished measurements are left alone; each writes its own file, so that a kill costs one at most.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import GOES_ON, command


@command(GOES_ON)
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=Path, help="JSON file of tasks")
    arguments = parser.parse_args(argv)
    from tqdm import tqdm  # these and with them torch only once the arguments stand

    from scripts.ablation.measures import measure
    from scripts.ablation.tasks import read_tasks
    from scripts.pocket.provenance import commit

    commit()  # that of the code as loaded
    for task in tqdm(read_tasks(arguments.tasks), desc="measuring", unit="task"):
        if task.result() is None:
            task.write(measure(task))


if __name__ == "__main__":
    sys.exit(main())
