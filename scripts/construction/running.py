"""From two folders to the tables: data sets, traces, trainings and measurements, each left alone where it is done."""

import argparse
import datetime
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from mosaic.config.loading import load_config
from mosaic.data import Manifest
from mosaic.files import read_json, require_file, write_text
from mosaic.locks import FolderLock
from mosaic.weights.numbers import without_tiny_numbers
from preprocess.construct.config import ConstructConfig, load_construct_config
from preprocess.construct.run import DATASET, EXPORT, construct
from preprocess.matching.run import one_thread
from scripts.ablation.loop import Step, child_environment, run_chains
from scripts.ablation.plan import BASE_CONFIG, ROOT, WORLD_DIGEST, Run, digest_of, judge_digest
from scripts.ablation.readme import put_between
from scripts.ablation.steps import cache_step, measure_step, train_step, training_state
from scripts.construction.drawings import draw_candidates
from scripts.construction.plan import CELLS, DataSet, described, make_runs, picture_tasks, real_tasks
from scripts.construction.tables import MARKER, block
from scripts.construction.tracing import trace
from scripts.pocket.provenance import commit, hardware, versions

RESULTS = "results.json"
EXACT, DRAWN, CONSTRUCTED = "exact", "drawn", "constructed"


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code: 0 done, 1 something failed.

    Raises:
        FileNotFoundError, OSError, ValueError: The constructed data or a setting will not do, or the folder is in use.
    """
    output, made = arguments.output, arguments.constructed
    if arguments.readme:
        require_file(arguments.readme, "--readme")
    count, batch_size = len(Manifest(made / DATASET, "train")), load_config(BASE_CONFIG).training.batch_size
    if count < batch_size:
        raise ValueError(f"--constructed must have at least a batch of {batch_size} samples to train on, got {count} in {made / DATASET}.")
    config = load_construct_config(arguments.config, [*arguments.set, f"num_samples={count}", "output.test_share=0"])
    with FolderLock(output, "--output") as lock:
        lock.acquire()
        drawn = make_drawn(config, output / DRAWN, count, arguments.drawings)
        traces = {
            DRAWN: traced(output / "trace_drawn.json", config, output / DRAWN, count, drawn=True),
            CONSTRUCTED: traced(output / "trace_constructed.json", config, made, count, drawn=False),
        }
        environment = child_environment(sys.executable)
        with tqdm(total=1, desc="exact data", unit="step") as bar:
            failures = run_chains([[exact_step(output, count)]], 1, environment, bar)
        if failures:
            return told(failures)
        data = [
            DataSet(EXACT, "exact: the world's own pictures, references and points", output / f"data/{EXACT}_{count}"),
            DataSet(DRAWN, "the world's pictures; masks, references and points constructed", drawn / DATASET),
            DataSet(CONSTRUCTED, "constructed: nothing exact in it", made / DATASET),
        ]
        runs = {one.name: make_runs(output, one, arguments.steps, arguments.seeds) for one in data}
        failures = train_and_measure(output, runs, arguments.cases, arguments.parallel)
        if failures:
            return told(failures)
        results = gather(arguments, data, runs, traces)
        write_text(output / RESULTS, json.dumps(results, indent=1) + "\n")
    text = block(results)
    print(text)
    if arguments.readme:
        put_between(arguments.readme, MARKER, text)
    return 0


def told(failures: list[str]) -> int:
    """Exit code of a command of which something failed, after saying what."""
    for failure in failures:
        print(f"construction_worth: failed: {failure}", file=sys.stderr)
    return 1


def make_drawn(config: ConstructConfig, output: Path, count: int, drawings: int) -> Path:
    """The data set that stages 3 to 5 make of drawings; returns the folder of its construction.

    Raises:
        ValueError: Too few of the drawings pass.
    """
    if not (output / DATASET).is_dir():
        draw_candidates(config, output, count * drawings)
        arguments = argparse.Namespace(output=output, stages=(3, EXPORT), device="cpu")
        with one_thread(), without_tiny_numbers():  # as preprocess/construct.py runs it
            print(construct(arguments, config, PartialState(cpu=True)))
    return output


def traced(file: Path, config: ConstructConfig, output: Path, count: int, *, drawn: bool) -> dict[str, Any]:
    """`trace`, from its file where it is done with these settings."""
    digest = digest_of([config.model_dump(mode="json"), count, WORLD_DIGEST, judge_digest(), str(output)])
    if file.is_file() and (found := read_json(file)).get("digest") == digest:
        return dict(found["trace"])
    found = {"digest": digest, "trace": trace(config, output, count, drawn=drawn)}
    write_text(file, json.dumps(found, indent=1) + "\n")
    return dict(found["trace"])


def exact_step(output: Path, count: int) -> Step:
    """Draw the exact data by scripts/make_pocket_world.py."""
    folder = output / f"data/{EXACT}_{count}"
    command = [sys.executable, str(ROOT / "scripts/make_pocket_world.py"), "--output", str(folder), "--num-samples", str(count)]
    command += ["--num-heldout", "0", "--max-subjects", "3"]
    partial = folder.with_name(folder.name + ".partial")
    return Step("exact data", command, output / "logs/exact.log", folder.is_dir, lambda: shutil.rmtree(partial, ignore_errors=True))


def train_and_measure(output: Path, runs: dict[str, list[Run]], cases: int, parallel: int) -> list[str]:
    """All that is left to do of it; returns messages of what failed."""
    some = next(iter(runs.values()))[0]
    first = [[measure_step(output, "real", real_tasks(output, some.config, cases).values())]]
    first += [[cache_step(output, output / "data" / name, of_data[0].config)] for name, of_data in runs.items()]
    seeds = zip(*runs.values(), strict=True)  # seed by seed, so that what is there early compares all
    then = [[train_step(output, one), measure_step(output, one.name, picture_tasks(one, cases).values())] for same in seeds for one in same]
    refresh = 1.0 if sys.stderr.isatty() else 60.0
    failures: list[str] = []
    with tqdm(total=len(first) + 2 * len(then), desc="worth", unit="step", mininterval=refresh) as bar:
        for chains in (first, then):
            bar.update(sum(step.is_done() for chain in chains for step in chain))
            failures = failures or run_chains(chains, parallel, child_environment(sys.executable), bar, refresh)
    return failures


def gather(arguments: argparse.Namespace, data: list[DataSet], runs: dict[str, list[Run]], traces: dict[str, Any]) -> dict[str, Any]:
    """All numbers, each beside what it is of."""
    some = runs[EXACT][0]
    real = {str(cell): task.result() for cell, task in real_tasks(arguments.output, some.config, arguments.cases).items()}
    entries = [
        {
            "arm": one.arm.name,
            "meaning": one.arm.meaning,
            "seed": one.seed,
            "digest": one.digest,
            "seconds": training_state(one)["seconds"],
            "measures": {
                str(one.steps): {"pictures": {str(cell): task.result() for cell, task in picture_tasks(one, arguments.cases).items()}}
            },
        }
        for of_data in runs.values()
        for one in of_data
    ]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware() | {"side_by_side": arguments.parallel},
        "versions": versions(),
        "samples": len(Manifest(data[0].root, "train")),
        "steps": arguments.steps,
        "cases": arguments.cases,
        "cells": [str(cell) for cell in CELLS],
        "data": [described(one) for one in data],
        "traces": traces,
        "real": real,
        "runs": entries,
    }
