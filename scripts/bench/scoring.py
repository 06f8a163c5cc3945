"""What `bench.py score` does."""

import argparse
import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from mosaic.evaluation import judging
from mosaic.evaluation.benchmarks import Benchmark
from mosaic.evaluation.chat import EndpointChat, LocalChat
from mosaic.evaluation.encoders import ClipEncoder, DinoEncoder
from mosaic.evaluation.entries import Entry, Listed, read_lines
from mosaic.evaluation.extremes import extremes
from mosaic.evaluation.measures import ClipSimilarity, Measure, ReferenceSimilarity
from mosaic.evaluation.prepared import entries_of_run, read_prepared
from mosaic.evaluation.records import Key, Record
from mosaic.evaluation.scoring import score
from mosaic.evaluation.tables import SCORES
from mosaic.files import nearest, require_folder, without_nan, write_text
from scripts.bench.preparing import find_benchmark

JUDGE_KEY = "JUDGE_API_KEY"  # of the environment: where a key of --judge-url may stand


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
    # Without `cpu`, accelerate takes several processes on a machine without an accelerator for one each.
    on_cpu = arguments.device.startswith("cpu") if arguments.device else not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))  # the first process to end waits for the last one
    try:
        scored = score(
            listed,
            build_measures(arguments, metrics, arguments.device or state.device),
            arguments.output,
            state,
            partial=arguments.partial,
        )
        if state.is_main_process:
            write_scores(arguments, benchmark, metrics, listed.entries, scored.records, scored.left_out)
    finally:
        state.destroy_process_group()


def read_entries(arguments: argparse.Namespace, benchmark: Benchmark) -> Listed:
    """The pictures that the command line names."""
    if arguments.pictures:
        root = arguments.pictures.parent
        return read_lines(arguments.pictures, lambda value, place: benchmark.read_entry(value, place, root))
    if arguments.prepared is None:
        raise ValueError("--run needs --prepared: the folder that `bench.py prepare` wrote says what its pictures should show.")
    prepared = read_prepared(arguments.prepared)
    if prepared.name != arguments.name:
        raise ValueError(
            f"--prepared: {arguments.prepared} holds {prepared.name}, not {arguments.name}. Name its folder, or score {prepared.name}."
        )
    return entries_of_run(arguments.run, prepared)


def build_measures(arguments: argparse.Namespace, metrics: Sequence[str], device: torch.device | str) -> list[Measure]:
    """What measures the metrics; models that none of them needs are not loaded."""
    measures: list[Measure] = []
    if {"clip_i", "clip_t"} & set(metrics):
        measures.append(ClipSimilarity(ClipEncoder(arguments.clip, "--clip", device)))
    if "dino" in metrics:
        measures.append(ReferenceSimilarity("dino", DinoEncoder(arguments.dino, "--dino", device)))
    if arguments.judge_url:
        measures.append(judging.Judge(EndpointChat(arguments.judge_url, arguments.judge, os.environ.get(JUDGE_KEY))))
    elif arguments.judge:
        measures.append(judging.Judge(LocalChat(arguments.judge, "--judge", device)))
    return measures


def write_scores(
    arguments: argparse.Namespace,
    benchmark: Benchmark,
    metrics: Sequence[str],
    entries: Sequence[Entry],
    records: Sequence[Record],
    left_out: Sequence[str],
) -> None:
    """Reduce records to scores.json, and print them."""
    values: defaultdict[str, dict[Key, float]] = defaultdict(dict)
    models: dict[str, dict[str, str]] = {}
    for record in records:
        if record.metric in metrics:
            values[record.metric][record.key] = record.value
            models[record.metric] = {"model": record.model, "revision": record.revision, "preprocessing": record.preprocessing}
    taken = {(record.case, record.run) for record in records}
    scored = [entry for entry in entries if (entry.case, entry.run) in taken]
    scores = {
        "format": "mosaic-scores",
        "version": 1,
        "benchmark": arguments.name,
        **benchmark.reduce(values, scored),
        "num_pictures": len({(entry.case, entry.run) for entry in scored}),
        "num_cases": len({entry.case for entry in scored}),
        "num_runs": len({entry.run for entry in scored}),
        "protocol": dataclasses.asdict(read_prepared(arguments.prepared).protocol) if arguments.run else None,
        "models": models,
        "extremes": {metric: extremes(found, scored, arguments.output) for metric, found in values.items()},
        "partial": bool(left_out),
        "left_out": list(left_out),
    }
    path = Path(arguments.output) / SCORES
    write_text(path, json.dumps(without_nan(scores), indent=2, ensure_ascii=False) + "\n")
    for metric in metrics:
        low, high = scores["intervals"][metric]
        print(f"{metric:8} {scores[metric]:6.2f}" + ("" if low is None else f"  [{low:.2f}, {high:.2f}]"))
    if left_out:
        print(
            f"PARTIAL: {len(left_out)} problems; scores are of {scores['num_pictures']} of {len(entries)} pictures. scores.json names them."
        )
    print(path)
