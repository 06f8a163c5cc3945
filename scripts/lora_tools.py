"""LoRA files: look into one, lower its rank, take it from the key styles of other programs, publish it.

    python scripts/lora_tools.py info FILE
    python scripts/lora_tools.py reduce FILE --rank 128 --output OUT      (or --energy 0.99)
    python scripts/lora_tools.py import FILE --output OUT
    python scripts/lora_tools.py push USER/NAME --lora FILE --scores SCORES      (with --dry-run FOLDER nothing is uploaded)

FILE may be in the style of diffusers, kohya's sd-scripts, ComfyUI, fal or XLabs, told by its keys. Files are read as safetensors only.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import NOTHING, command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="key style, rank, modules, size, digest, metadata")
    info.add_argument("file", type=Path)
    info.add_argument("--json", action="store_true", help="print one JSON object")
    reduce = commands.add_parser("reduce", help="the nearest LoRA of a lower rank, by singular value decomposition")
    reduce.add_argument("file", type=Path)
    to = reduce.add_mutually_exclusive_group(required=True)
    to.add_argument("--rank", type=int, help="the rank of every module")
    to.add_argument("--energy", type=float, help="the lowest common rank that keeps this share of the squared norm, such as 0.99")
    bring = commands.add_parser("import", help="write the keys that MOSAIC and diffusers use")
    bring.add_argument("file", type=Path)
    bring.add_argument("--transformer-only", action="store_true", help="leave out what the file has for text encoders")
    push = commands.add_parser("push", help="upload a reference LoRA with a model card, its scores and examples")
    push.add_argument("repo", metavar="USER/NAME", help="model on the Hugging Face hub")
    push.add_argument("--lora", type=Path, required=True, help="the reference LoRA")
    push.add_argument(
        "--scores", nargs="*", default=[], metavar="[NAME=]FOLDER", help="scorings of scripts/bench.py, for the card's tables"
    )
    push.add_argument("--examples", nargs="*", default=[], type=Path, help="pictures that it made")
    push.add_argument("--data", type=Path, help="folder of the training data, whose manifest's digest the card states")
    push.add_argument("--base-model", help="hub id of the base (default: what the LoRA was trained on)")
    push.add_argument("--license", help="id as the hub writes it (default: the base's, where it is known)")
    push.add_argument("--private", action="store_true", help="make the model on the hub a private one")
    push.add_argument("--dry-run", type=Path, metavar="FOLDER", help="write the repository into this folder, and upload nothing")
    for writing in (reduce, bring):
        writing.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
        writing.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    return parser.parse_args(argv)


@command(NOTHING)
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(argv)
    if arguments.command == "push":
        from scripts.loras.publishing import push

        print(push(arguments))
        return
    from scripts.loras.command import run  # torch and the like only once the arguments stand

    run(arguments)


if __name__ == "__main__":
    sys.exit(main())
