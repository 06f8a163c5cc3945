"""What `bench.py list` and `bench.py prepare` do."""

import argparse
import dataclasses
from collections import Counter

from mosaic.evaluation.benchmarks import BENCHMARKS, Benchmark
from mosaic.evaluation.cost import gpu_hours
from mosaic.evaluation.prepared import write_prepared
from mosaic.files import nearest, require_folder

LIMITS = {"runs": (1, 64), "size": (16, 8192), "seed": (0, 2**62)}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of a name. Raises ValueError where there is none."""
    if name not in BENCHMARKS:
        raise ValueError(f"{name}: is no benchmark.{nearest(name, BENCHMARKS)} There are: {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line says. Raises FileNotFoundError or ValueError where data or flags will not do."""
    if arguments.command == "list":
        for name, benchmark in BENCHMARKS.items():
            made = benchmark.protocol
            pictures = f"{made.runs} pictures a case, {made.size} px, seeds from {made.seed}"
            print(f"{name:18} {benchmark.about}; {pictures}; {', '.join(benchmark.metrics)}")
        return
    benchmark = find_benchmark(arguments.name)
    require_folder(arguments.output, "--output")
    changes = {name: getattr(arguments, name) for name in LIMITS if getattr(arguments, name) is not None}
    for name, value in changes.items():
        low, high = LIMITS[name]
        if not low <= value <= high:
            raise ValueError(f"--{name} must be of {low}..{high}, got {value}.")
    protocol, cases = dataclasses.replace(benchmark.protocol, **changes), benchmark.cases_of_data(arguments.data, arguments.list)
    write_prepared(arguments.output, arguments.name, protocol, cases)
    changed = f" ({', '.join(changes)} not the protocol's)" if changes and protocol != benchmark.protocol else ""
    print(f"{len(cases)} cases of {protocol.runs} pictures, {protocol.size} px, seeds from {protocol.seed}{changed}: {arguments.output}")
    kinds = Counter(", ".join(subject.kind for subject in case.subjects) for case in cases if case.subjects[0].kind)
    for kind, count in kinds.items():
        print(f"  {count} of {kind}")
    fast, slow = gpu_hours(cases, protocol)
    print(f"Rendering with FLUX.1-dev, 28 steps: {fast:.1f} to {slow:.1f} hours of one H100 or H200 (by the FLOP model; half with 2 GPUs).")
    print(f"Render: accelerate launch scripts/bench.py render {arguments.output} --output {arguments.output / 'run'} --config CONFIG")
