"""Looks over a training run before anything heavy: counts, FLOPs, memory by part, time, disk, and whether everything it needs is there.

    python scripts/preflight.py CONFIG [--set section.field=value ...] [--gpu NAME | --gpu-memory GIB] [--references K] [--json FILE]
    python scripts/preflight.py --table [training|inference]

Processes and sharding are those that train.sh would start in this environment (NUM_PROCESSES=8 before the command: eight processes). Loads
and downloads no weights, writes nothing but FILE. Exit code 0: ready; 1: something would stop training; 2: the command or the
config is wrong. --table: which settings, or which values of inference.memory, fit which cards with FLUX.1-dev, in a few minutes.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import NOTHING, command
from mosaic.config.loading import load_config
from mosaic.files import require_file, write_text
from scripts.launching import launch


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="JSON file, such as configs/pocket.json")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override one setting; may be repeated")
    parser.add_argument("--resume", metavar="auto|FOLDER", help="as for scripts/train.py")
    parser.add_argument("--gpu", metavar="NAME", help='plan for this card, such as "RTX 4090", instead of the one that is here')
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="plan for a card of this size instead of the one that is here")
    parser.add_argument("--references", type=int, metavar="K", help="plan for K references instead of the most that the data have")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    what = "print which settings fit cards of 12 to 141 GB"
    parser.add_argument("--table", nargs="?", const="training", choices=["training", "inference"], help=what)
    arguments = parser.parse_args(argv)
    if bool(arguments.config) == bool(arguments.table):
        parser.error("give either CONFIG or --table")
    for name in ("gpu_memory", "references"):
        if getattr(arguments, name) is not None and getattr(arguments, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(arguments, name)}")
    return arguments


def planned_environment(elsewhere: bool = False) -> Mapping[str, str]:
    """The variables of the first process that train.sh would start in this environment.

    Args:
        elsewhere: Whether the run is planned for other GPUs than those of this machine, of which there may be fewer.

    Raises:
        FileNotFoundError: The Accelerate config is missing.
        ValueError: A variable of the launcher is missing, contradicts another, or is no number in its range; or it asks for more
            processes than there are GPUs, or a config for a single process.
    """
    if "LOCAL_RANK" in os.environ:  # accelerate launch has started this process
        return os.environ
    environ, gpus = dict(os.environ), launch.count_gpus()
    if elsewhere:
        environ.setdefault("NUM_PROCESSES", str(max(gpus, 1)))
    machines = environ.get("SLURM_JOB_NUM_NODES", "1")
    if machines != "1" and not (environ.get("SLURM_STEP_NUM_NODES") or environ.get("NNODES")):  # to be started by srun, later
        environ |= {"NNODES": machines, "NODE_RANK": "0", "MASTER_ADDR": "the first machine"}
    return launch.process_environments(launch.make_plan(environ, 0 if elsewhere else gpus), environ)[0]


def say(what: str) -> None:
    """What is done next."""
    print(f"preflight: {what} ...", file=sys.stderr, flush=True)


@command(NOTHING)
def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = parse_arguments(argv)
    if arguments.table:
        from scripts.launching.memory_table import print_inference_table, print_table

        print_table() if arguments.table == "training" else print_inference_table()
        return 0
    require_file(arguments.json, "--json")
    config = load_config(arguments.config, arguments.set)
    from mosaic.planning.cards import find_card
    from mosaic.planning.preflight import as_dict, as_text, preflight  # torch is imported only once the config stands

    card = find_card(arguments.gpu) if arguments.gpu is not None else None
    environ = planned_environment(elsewhere=card is not None or arguments.gpu_memory is not None)
    report = preflight(config, environ, arguments.resume, arguments.gpu_memory, arguments.references, card, say)
    print(as_text(report))
    if arguments.json:
        write_text(arguments.json, json.dumps(as_dict(report), indent=2, ensure_ascii=False) + "\n")
    return 0 if report.ready else 1


if __name__ == "__main__":
    raise SystemExit(main())
