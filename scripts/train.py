"""Train a reference LoRA: `bash train.sh CONFIG [--set section.field=value ...] [--resume auto|FOLDER] [--dry-run | --print-config]`."""

import argparse
import logging
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.launching.processes import end_on_signals

if __name__ == "__main__":
    end_on_signals()

from mosaic.commands import command, importing
from mosaic.config.loading import config_to_json, load_config


@command("the steps since the last checkpoint are lost, --resume auto goes on from that")
def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0 done, 2 an error, 75 stopped by a signal and ready to be continued by --resume auto."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="JSON file, such as configs/pocket.json")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override one setting; may be repeated")
    parser.add_argument("--resume", metavar="auto|FOLDER", help="continue from the newest checkpoint of the run, or from this one")
    parser.add_argument("--dry-run", action="store_true", help="look over the run as scripts/preflight.py does, and exit")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config as JSON and exit")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # RMSNorm under autocast: only not fused
    # Nothing here changes a block's output in place, of which FSDP2 warns wherever an output is a view.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    config = load_config(arguments.config, arguments.set)
    if arguments.print_config:
        print(config_to_json(config), end="")
        return 0
    if arguments.dry_run:
        from mosaic.planning.preflight import as_text, preflight
        from scripts.preflight import planned_environment, say

        report = preflight(config, planned_environment(), arguments.resume, say=say)
        print(as_text(report))
        return 0 if report.ready else 1
    with importing():  # these only once the config stands
        import torch

        from mosaic.planning.preflight import CURES
        from mosaic.training import train
        from mosaic.training.signals import REQUEUE_EXIT_CODE, TrainingStopped
        from mosaic.weights.numbers import without_tiny_numbers

    try:
        with without_tiny_numbers():
            path = train(config, arguments.resume)
    except TrainingStopped as stopped:
        print(stopped, file=sys.stderr)
        return REQUEUE_EXIT_CODE
    except torch.OutOfMemoryError as error:
        raise ValueError(f"the device's memory is full: {str(error).partition('. ')[0]}. {CURES}") from error
    print(f"reference LoRA: {path}")
    return 0


if __name__ == "__main__":
    code = main()
    end_on_signals(code)
    sys.exit(code)
