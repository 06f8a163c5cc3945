"""Train a reference LoRA: `bash train.sh CONFIG [--set section.field=value ...] [--resume auto|FOLDER] [--dry-run]`."""

import argparse
import logging
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.config import config_to_json, load_config


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="JSON file, such as configs/pocket.json")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override one setting; may be repeated")
    parser.add_argument("--resume", metavar="auto|FOLDER", help="continue from the newest checkpoint of the run, or from this one")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and exit")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # RMSNorm under autocast: only not fused
    # Nothing here changes a block's output in place, of which FSDP2 warns wherever an output is a view.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    try:
        config = load_config(arguments.config, arguments.set)
        if arguments.dry_run:
            print(config_to_json(config), end="")
            return 0
        from mosaic.training import train  # torch and diffusers are imported only once the config stands

        path = train(config, arguments.resume)
    except (ValueError, OSError) as error:
        # An error of a data loading process carries that process's traceback; its last line is the message.
        message = str(error).strip().splitlines() or [type(error).__name__]
        print(f"error: {message[-1].removeprefix(f'{type(error).__name__}: ')}", file=sys.stderr)
        return 2
    print(f"reference LoRA: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
