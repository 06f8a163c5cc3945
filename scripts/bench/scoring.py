"""What `bench.py score` does."""

import argparse
import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from mosaic.evaluation import judging
from mosaic.evaluation.benchmarks import Benchmark
from mosaic.evaluation.collapse import collapsed
from mosaic.evaluation.entries import Listed, read_lines
from mosaic.evaluation.extremes import extremes
from mosaic.evaluation.prepared import entries_of_grids, entries_of_run, read_prepared
from mosaic.evaluation.records import Key, Record
from mosaic.evaluation.scoring import Sound, score, sound_entries
from mosaic.evaluation.tables import SCORES
from mosaic.files import nearest, require_folder, without_nan, write_text
from scripts.bench.models import build_measures, require_files
from scripts.bench.preparing import find_benchmark


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line says. Raises FileNotFoundError or ValueError where pictures, models or flags will not do."""
    benchmark = find_benchmark(arguments.name)
    require_folder(arguments.output, "--output")
    metrics = tuple(arguments.metrics or benchmark.metrics)
    for metric in metrics:
        if metric not in benchmark.metrics:
            known = ", ".join(benchmark.metrics)
            raise ValueError(f"--metrics: {metric} is not of {arguments.name}.{nearest(metric, known.split(', '))} Its are: {known}.")
    if arguments.judge_url and not arguments.judge:
        raise ValueError("--judge-url needs --judge: what the endpoint calls the model.")
    metrics += judging.METRICS if arguments.judge else ()
    listed = read_entries(arguments, benchmark)
    require_files(arguments, metrics, listed.entries)
    # Without `cpu`, accelerate takes several processes on a machine without an accelerator for one each.
    on_cpu = arguments.device.startswith("cpu") if arguments.device else not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))  # the first process to end waits for the last one
    try:
        sound = sound_entries(listed, arguments.partial, shown=state.is_main_process)
        measures = build_measures(arguments, metrics, sound.entries, arguments.device or state.device)
        records = score(sound.entries, measures, arguments.output, state)
        if state.is_main_process:
            write_scores(arguments, benchmark, metrics, len(listed.entries), sound, records)
    finally:
        state.destroy_process_group()


def read_entries(arguments: argparse.Namespace, benchmark: Benchmark) -> Listed:
    """The pictures that the command line names."""
    if arguments.pictures:
        root = arguments.pictures.parent
        return read_lines(arguments.pictures, lambda value, place: benchmark.read_entry(value, place, root))
    if arguments.prepared is None:
        flag = "--run" if arguments.run else "--grids"
        raise ValueError(f"{flag} needs --prepared: the folder that `bench.py prepare` wrote says what its pictures should show.")
    prepared = read_prepared(arguments.prepared)
    if prepared.name != arguments.name:
        raise ValueError(
            f"--prepared: {arguments.prepared} holds {prepared.name}, not {arguments.name}. Name its folder, or score {prepared.name}."
        )
    return entries_of_run(arguments.run, prepared) if arguments.run else entries_of_grids(arguments.grids, prepared)


def write_scores(
    arguments: argparse.Namespace,
    benchmark: Benchmark,
    metrics: Sequence[str],
    num_entries: int,
    sound: Sound,
    records: Sequence[Record],
) -> None:
    """Reduce records to scores.json, and print them."""
    values: defaultdict[str, dict[Key, float]] = defaultdict(dict)
    models: dict[str, dict[str, str]] = {}
    left = set(benchmark.metrics) - set(metrics)  # what a model measures beside what it was asked for; other metrics stand beside these
    for record in records:
        if record.metric not in left:
            values[record.metric][record.key] = record.value
            models[record.metric] = {"model": record.model, "revision": record.revision, "preprocessing": record.preprocessing}
    scores = {
        "format": "mosaic-scores",
        "version": 1,
        "benchmark": arguments.name,
        **benchmark.reduce(values, sound.entries),
        "num_pictures": len(sound.entries),
        "num_cases": len({entry.case for entry in sound.entries}),
        "num_runs": len({entry.run for entry in sound.entries}),
        "protocol": dataclasses.asdict(read_prepared(arguments.prepared).protocol) if arguments.run else None,
        "models": models,
        "extremes": {metric: extremes(found, sound.entries, arguments.output) for metric, found in values.items()},
        **({"collapse": collapsed(values)} if "instance" in values else {}),
        "partial": bool(sound.left_out),
        "left_out": sound.left_out,
    }
    path = Path(arguments.output) / SCORES
    write_text(path, json.dumps(without_nan(scores), indent=2, ensure_ascii=False) + "\n")
    for metric, (low, high) in scores["intervals"].items():
        print(f"{metric:16} {scores[metric]:6.2f}" + ("" if low is None else f"  [{low:.2f}, {high:.2f}]"))
    if sound.left_out:
        of_all = f"{scores['num_pictures']} of {num_entries} pictures"
        print(f"PARTIAL: {len(sound.left_out)} problems; scores are of {of_all}. scores.json names them.")
    print(path)
