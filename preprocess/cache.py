"""Fill the caches of a config: accelerate launch preprocess/cache.py CONFIG --set data.latent_cache=DIR [--set data.text_cache=DIR]

What the frozen encoders make of the samples of `data.split` is the same in every epoch, so it can be kept. The latent cache holds mean and
logarithmic variance of the VAE's posterior of every picture (768 KiB per sample at 512 px, K = 2), the text cache the embeddings of every
distinct prompt and of the empty one (4 MiB each). Training with the same config then reads them instead of encoding; with both, and without
validation, VAE and text encoders are not loaded. Every process takes its own share; finished shards are kept, so an interrupted run
goes on when started again. Plain `python preprocess/cache.py` runs one process.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import GOES_ON, command
from mosaic.config.loading import Config, load_config


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="JSON file, such as configs/pocket.json")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override one setting; may be repeated")
    parser.add_argument("--shard-size", type=int, default=128, metavar="N", help="samples or prompts per file (default: 128)")
    parser.add_argument("--device", help="device of the encoders (default: this process's GPU, else the CPU)")
    return parser.parse_args(argv)


def read_config(arguments: argparse.Namespace) -> Config:
    """The config that the command line names, with caches to fill.

    Raises:
        FileNotFoundError, ValueError: It cannot be read, or it or a flag does not say what to do.
    """
    config = load_config(arguments.config, arguments.set)
    data = config.data
    if data.latent_cache is None and data.text_cache is None:
        raise ValueError("nothing to cache: name a folder with --set data.latent_cache=DIR, --set data.text_cache=DIR, or both.")
    if data.latent_cache == data.text_cache:
        raise ValueError(f"data.latent_cache and data.text_cache must be two folders, got {data.latent_cache} twice.")
    if arguments.shard_size < 1:
        raise ValueError(f"--shard-size must be at least 1, got {arguments.shard_size}.")
    return config


@command(GOES_ON)
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(argv)
    config = read_config(arguments)
    from preprocess.encoding import run  # torch and the like only once the config stands

    run(config, arguments)


if __name__ == "__main__":
    sys.exit(main())
