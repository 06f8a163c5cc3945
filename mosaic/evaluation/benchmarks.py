"""The benchmarks by name: how their pictures are made, how lines on anyone's pictures are read, and how scores are taken."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mosaic.evaluation import dreambench, dreambench_scores, xversebench, xversebench_scores
from mosaic.evaluation.entries import Entry
from mosaic.evaluation.prepared import PreparedCase, Protocol
from mosaic.evaluation.records import Key


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        about: What it is, in a line.
        num_cases: How many cases its authors have.
        protocol: How its authors, or those whose lists are used, make the pictures.
        metrics: What is measured unless less is asked for.
        models: By metric the hub id of the model that it is defined by.
        cases_of_data: The cases of a folder of its data, or of a list with the pictures there (`dreambench.cases_of_data`).
        read_entry: Entries of a line on anyone's pictures, its place and the folder of its paths (`dreambench.read_entry`).
        reduce: Scores from values by metric and the pictures.
    """

    about: str
    num_cases: int
    protocol: Protocol
    metrics: tuple[str, ...]
    models: Mapping[str, str]
    cases_of_data: Callable[[Path, Path | None], list[PreparedCase]]
    read_entry: Callable[[dict[str, Any], str, Path], list[Entry]]
    reduce: Callable[[Mapping[str, Mapping[Key, float]], Sequence[Entry]], dict[str, Any]]


_UNO = Protocol(runs=6, size=512, seed=3407)
_CLIP, _DINO = "openai/clip-vit-base-patch32", "facebook/dino-vits16"
_DREAMBENCH = {"clip_i": _CLIP, "clip_t": _CLIP, "dino": _DINO}


_XVERSE = Protocol(runs=4, size=768, seed=42)
_XVERSEBENCH = {"dpg": "damo/mplug_visual-question-answering_coco_large_en", "ip_sim": _DINO}


def _dreambench(about: str, *, multi: bool) -> Benchmark:
    cases = partial(dreambench.cases_of_data, multi=multi)
    return Benchmark(about, 750, _UNO, dreambench_scores.METRICS, _DREAMBENCH, cases, dreambench.read_entry, dreambench_scores.reduce)


def _xversebench(about: str, num_cases: int, name: str) -> Benchmark:
    cases, metrics = partial(xversebench.cases_of_data, name=name), xversebench_scores.METRICS
    return Benchmark(about, num_cases, _XVERSE, metrics, _XVERSEBENCH, cases, xversebench.read_entry, xversebench_scores.reduce)


BENCHMARKS = {
    "dreambench": _dreambench("DreamBench, one subject: 30 subjects x 25 prompts", multi=False),
    "dreambench_multi": _dreambench("DreamBench, two subjects: 30 pairs x 25 prompts", multi=True),
    "xversebench": _xversebench("XVerseBench, one subject: 90 cases", 90, "single"),
    "xversebench_multi": _xversebench("XVerseBench, two and three subjects: 120 + 90 cases", 210, "multi"),
}
