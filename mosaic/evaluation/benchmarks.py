"""The benchmarks by name: how their pictures are made, how lines on anyone's pictures are read, and how scores are taken."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosaic.evaluation import dreambench, dreambench_scores
from mosaic.evaluation.entries import Entry
from mosaic.evaluation.prepared import Protocol
from mosaic.evaluation.records import Key


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        about: What it is, in a line.
        protocol: How its authors, or those whose lists are used, make the pictures.
        metrics: What is measured unless less is asked for.
        read_entry: Entries of a line on anyone's pictures, its place and the folder of its paths (`dreambench.read_entry`).
        reduce: Scores from values by metric and the pictures.
    """

    about: str
    protocol: Protocol
    metrics: tuple[str, ...]
    read_entry: Callable[[dict[str, Any], str, Path], list[Entry]]
    reduce: Callable[[Mapping[str, Mapping[Key, float]], Sequence[Entry]], dict[str, Any]]


_UNO = Protocol(runs=6, size=512, seed=3407)

BENCHMARKS = {
    "dreambench": Benchmark(
        "DreamBench, one subject: 30 subjects x 25 prompts",
        _UNO,
        dreambench_scores.METRICS,
        dreambench.read_entry,
        dreambench_scores.reduce,
    ),
    "dreambench_multi": Benchmark(
        "DreamBench, two subjects: 30 pairs x 25 prompts", _UNO, dreambench_scores.METRICS, dreambench.read_entry, dreambench_scores.reduce
    ),
}
