"""Training steps and sampling of several models in one run: what scripts/benchmark.py does without a command."""

import argparse
import json
import time
from typing import Any

from mosaic.files import write_text
from scripts.benchmarks import infer, train


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure each model with the defaults of `train` and `infer`, print their tables, return both results by model."""
    from scripts.benchmarks.command import parse

    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "train": {}, "infer": {}}
    for model in args.models:
        for name, benchmark in (("train", train.run), ("infer", infer.run)):
            flags = ["--model", model, "--threads", str(args.threads), "--k", *map(str, args.k), *([] if args.twin else ["--no-twin"])]
            print(f"\n## {model}, {name}\n", flush=True)
            result[name][model] = benchmark(parse([name, *flags]))
            if args.output:
                write_text(args.output, json.dumps(result, indent=2) + "\n")
    return result
