"""LoRA files: look into one, lower its rank, and take it from the key styles of other programs.

    python scripts/lora_tools.py info FILE
    python scripts/lora_tools.py reduce FILE --rank 128 --output OUT      (or --energy 0.99)
    python scripts/lora_tools.py import FILE --output OUT

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
    for writing in (reduce, bring):
        writing.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
        writing.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    return parser.parse_args(argv)


@command(NOTHING)
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(argv)
    from scripts.loras.command import run  # torch and the like only once the arguments stand

    run(arguments)


if __name__ == "__main__":
    sys.exit(main())
