"""Command line arguments that name extractors, shared by the commands of this folder."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from preprocess.extractors import EXTRACTORS, ExtractorSpec, extractor_spec

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def add_extractor_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --extractors, --set, --device and --dtype."""
    parser.add_argument("--extractors", default=default, metavar="NAMES", help=f"comma-separated, of {', '.join(EXTRACTORS)}")
    parser.add_argument(
        "--set", action="append", default=[], metavar="EXTRACTOR.OPTION=VALUE", help="option of an extractor, such as dift.size=768"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU of its own for each process if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="number format of the extractors' weights")


def extractor_specs(arguments: argparse.Namespace) -> list[ExtractorSpec]:
    """Return the extractors asked for, checked but not built.

    Raises:
        ValueError: A name is unknown or given twice, or an option is unknown, does not fit, or belongs to an extractor that is not used.
    """
    options = assigned_options(arguments.extractors, arguments.set, "--set")
    return [extractor_spec(name, {option: json_value(text) for option, text in own.items()}) for name, own in options.items()]


def assigned_options(extractors: str, assignments: Sequence[str], flag: str) -> dict[str, dict[str, str]]:
    """What is assigned to the options of each extractor, as text.

    Args:
        extractors: Comma-separated names.
        assignments: Such as dift.size=768.
        flag: Of the assignments, for messages.

    Raises:
        ValueError: A name is given twice, or something is assigned to an extractor that is not used.
    """
    names = [name.strip() for name in extractors.split(",")]
    if len(set(names)) != len(names):
        raise ValueError(f"--extractors must name each extractor once, got {extractors}.")
    options: dict[str, dict[str, str]] = {name: {} for name in names}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        name, dot, option = key.partition(".")
        if not equals or not dot:
            raise ValueError(f"{flag} must look like dift.size=768, got {assignment}.")
        if name not in options:
            raise ValueError(f"{flag} {assignment}: {name} is not among --extractors {extractors}.")
        options[name][option] = value
    return options


def check_device(name: str) -> "torch.device":
    """Return a device, or raise ValueError if torch does not know it or it is not there."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]}).") from error
    return device


def json_value(text: str) -> Any:
    """A JSON value, or the text itself where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
