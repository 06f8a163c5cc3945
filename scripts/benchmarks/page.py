"""The part of docs/speed.md that is measured: the command `page` of scripts/benchmark.py writes it from the results in assets/speed.

changes.json is written by hand, a row for every change: what was expected of it before it was made, and what it brought. The other files
are what the commands wrote: against.json, speed.json, gpu.json. One that is not there is named as not measured.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.ablation.readme import put_between
from scripts.benchmarks import against, gpu

MARKER = "<!-- speed -->"
NOT_YET = "not measured yet"


def run(args: argparse.Namespace) -> None:
    """Write the part between the markers.

    Raises:
        FileNotFoundError: There is no such page, or no changes.json.
        ValueError: The page has not exactly two markers, or a file is no result.
    """
    put_between(args.page, MARKER, block(args.results))
    print(f"written into {args.page}")


def block(results: Path) -> str:
    """Tables as Markdown, from a folder of results."""
    changes = read(results / "changes.json")
    if changes is None:
        raise FileNotFoundError(f"{results / 'changes.json'}: file not found; it has the changes and what was expected of them.")
    parts = [changes_table(changes)]
    for name, made_by, shown in (
        ("against", "python scripts/benchmark.py against ../before", against.table),
        ("speed", "python scripts/benchmark.py", speed_table),
        ("gpu", "python scripts/benchmark.py gpu", gpu.table),
    ):
        found = read(results / f"{name}.json")
        parts += [f"`{made_by}`:", f"{NOT_YET[0].upper()}{NOT_YET[1:]}." if found is None else shown(found)]
    return "\n\n".join(parts)


def read(path: Path) -> Any:
    """A JSON file, or None where there is none.

    Raises:
        ValueError: It is not JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from error


def changes_table(changes: Mapping[str, Any]) -> str:
    """A row for every change: what was predicted and found of it alone."""
    lines = [changes["note"], "", "| change | of | predicted | found |", "|---|---|---|---|"]
    for row in changes["changes"]:
        lines.append(f"| {row['change']} | {row['of']} | {row['predicted']} | {row['found'] or NOT_YET} |")
    return "\n".join(lines)


def speed_table(speed: Mapping[str, Any]) -> str:
    """A row for every model, command, K and mode, of what `python scripts/benchmark.py` has measured."""
    head = ("model", "step", "K", "s/step", "of product %", "TFLOP/step", "MiB above the model", "x twin")
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for kind in ("train", "infer"):
        for model, result in speed[kind].items():
            for row in result["rows"]:
                rate = result["product_tflops"]
                tflop = row["of product %"] / 100 * row["s/step"] * rate
                twin = "" if row["x twin"] is None else f"{row['x twin']:.2f}"
                step = "train" if kind == "train" else row["mode"]
                lines.append(
                    f"| {model} | {step} | {row['K']} | {row['s/step']:.3g} | {row['of product %']:.0f} | {tflop:.3g} "
                    f"| {1024 * row['above the model GiB']:.0f} | {twin} |"
                )
    some = next(iter(speed["train"].values()))
    made = f"{some['device']}, {some['clock']} time, {speed['date']}; a large product: {1000 * some['product_tflops']:.0f} GFLOP/s."
    return "\n".join([made, "", *lines])
