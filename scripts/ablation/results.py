"""All that a trial has found, in one JSON file: every number beside the run it comes from."""

import dataclasses
import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file

from mosaic.config.loading import load_config
from mosaic.files import read_json, write_text
from mosaic.training.watch.run_log import RunLog
from mosaic.weights.digests import file_digest
from scripts.ablation.plan import FIRST_SCENES, WORLD_DIGEST, Cell, Plan, Run, base_digest, judge_digest
from scripts.ablation.steps import is_trained, training_state
from scripts.ablation.tasks import are_done, features_file, real_tasks, run_tasks
from scripts.pocket.frechet import frechet_distance
from scripts.pocket.provenance import commit, hardware, versions

RESULTS = "results.json"
FORMAT = "mosaic-ablation"
VERSION = 5
BEFORE = 4  # of the ablation before the trial, docs/ablation.md
CURVES = ("loss/flow_matching", "loss/correspondence", "loss/disentanglement", "loss/target_correspondence", "loss/own_reference")
CURVE_POINTS = 60  # a longer curve is shortened by means over stretches


def refuse_other_runs(plan: Plan) -> None:
    """Refuse a folder whose results hold runs that are not of this plan, for they would be lost from it.

    Raises:
        ValueError: It has some.
    """
    path = plan.output / RESULTS
    if not path.is_file():
        return
    entries = read_json(path).get("runs", [])  # of any version: all of it is written anew
    others = sorted({run["name"] for run in entries if run["status"] != "not started"} - {run.name for run in plan.runs})
    if others:
        raise ValueError(
            f"{path}: has {len(others)} runs that are not of this command, such as {others[0]}: of other flags, another base or another "
            "world. Give the same flags, or another --output."
        )


def write_results(plan: Plan, parallel: int, threads: int) -> Path:
    """Write what is there of a trial, finished or not; runs in the folder that are not of this plan are left out."""
    tasks = real_tasks(plan)
    done = {key: result for key, task in tasks.items() if (result := task.result())}
    real: dict[str, dict[str, Any]] = {}
    for (first, cell), result in done.items():
        real.setdefault(str(first), {})[str(cell)] = result
    renderings = {key: features_file(tasks[key]) for key in done}
    runs = [_run_entry(plan, run, renderings) for run in plan.runs]
    manifest = plan.data / "manifest.parquet"
    config = load_config(plan.runs[0].config)
    results = {
        "format": FORMAT,
        "version": VERSION,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "size": dataclasses.asdict(plan.size) | {"cells": [str(cell) for cell in plan.size.cells]},
        "hardware": hardware() | {"side_by_side": parallel, "threads": threads},
        "versions": versions(),
        "data": {"folder": _relative(plan, plan.data), "manifest_digest": file_digest(manifest) if manifest.is_file() else None},
        "model": {"name": config.model.pretrained, "digest": base_digest(config.model.pretrained)},
        "judge_digest": judge_digest(),
        "world_digest": WORLD_DIGEST,
        "seconds": _seconds(runs, done.values()),
        "complete": all(entry["complete"] for entry in runs) and are_done(tasks.values()),
        "real": real,
        "runs": runs,
    }
    plan.output.mkdir(parents=True, exist_ok=True)
    write_text(plan.output / RESULTS, json.dumps(results, indent=1) + "\n")
    return plan.output / RESULTS


def read_results(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not one of ours.
    """
    results = read_json(path)
    if not isinstance(results, dict) or (results.get("format"), results.get("version")) != (FORMAT, VERSION):
        old = f"; {path} is of version {BEFORE}, which stays as it was drawn" if _version_of(results) == BEFORE else ""
        raise ValueError(f"{path}: must be a results file of scripts/ablation.py, format {FORMAT!r} version {VERSION}{old}.")
    return results


def read_measured(path: Path) -> dict[str, Any]:
    """Read a results file of this version or the one before, as far as pictures at the end of runs go.

    Raises:
        FileNotFoundError, ValueError: As `read_results`.
    """
    results = read_json(path)
    if _version_of(results) != BEFORE:
        return read_results(path)
    runs = [
        {
            **run,
            "first_scene": 0,
            "measures": {str(run["steps"]): {"pictures": {f"distinct_k{k}": found for k, found in run["measures"].items()}}},
        }
        for run in results["runs"]
        if "main" in run["parts"] and run["seed"] == 0
    ]
    return {**results, "runs": runs}


def _version_of(results: Any) -> int | None:
    return results.get("version") if isinstance(results, dict) and results.get("format") == FORMAT else None


def _run_entry(plan: Plan, run: Run, renderings: dict[tuple[int, Cell], Path]) -> dict[str, Any]:
    tasks = run_tasks(plan, run)
    measures: dict[str, dict[str, dict[str, Any]]] = {}
    for (step, kind, cell), task in tasks.items():
        result = task.result()
        if result is not None:
            measures.setdefault(str(step), {}).setdefault(kind, {})[str(cell)] = result
    first = FIRST_SCENES[run.part]
    drawn = [tasks[run.steps, "pictures", cell] for cell in plan.size.cells if (first, cell) in renderings and cell.regime == "distinct"]
    pairs = [(features_file(task), renderings[first, Cell(task.regime, task.num_references)]) for task in drawn if task.result()]
    state = training_state(run) if run.lora else {"status": "finished", "seconds": 0.0}
    trained = run.lora is None or is_trained(run)
    return {
        "name": run.name,
        "part": run.part,
        "arm": run.arm.name,
        "meaning": run.arm.meaning,
        "seed": run.seed,
        "first_scene": first,
        "steps": run.steps if run.lora else 0,
        "start": _relative(plan, run.start) if run.start else None,
        "folder": _relative(plan, run.folder),
        "config": _relative(plan, run.config),
        "config_digest": run.digest,
        "adapter_digest": file_digest(run.lora) if run.lora and trained else None,
        "settings": dict(run.arm.settings),
        "status": state.get("status", "not started"),
        "complete": trained and are_done(tasks.values()),
        "training_seconds": state.get("seconds", 0.0),
        "commit": state.get("commit"),
        "versions": state.get("versions"),
        "measures": measures,
        "frechet": pooled_frechet(pairs),
        "curves": curves_of(run.folder / "metrics.jsonl"),
    }


def pooled_frechet(files: list[tuple[Path, Path]]) -> float | None:
    """Frechet distance between the pictures of all K together and as many K of real renderings; of one K alone it would be mostly bias.

    Args:
        files: Per K the file with the pictures' features ("own"), and that with the renderings' ("others").
    """
    if not files:
        return None
    own, others = (torch.cat([load_file(pair[side])[name] for pair in files]) for side, name in ((0, "own"), (1, "others")))
    return frechet_distance(own, others)


def curves_of(file: Path) -> dict[str, list[list[float]]]:
    """(step, value) of the logged measures of a run; of long curves means over stretches of equal numbers of entries.

    MDL is exactly 0 in batches of one reference, which do not count.
    """
    entries, curves = RunLog(file).entries(), {}
    for name in CURVES:
        points = [(entry["step"], value) for entry in entries if isinstance(value := entry.get(name), float | int) and value == value]
        stretch, curve = -(-len(points) // CURVE_POINTS) or 1, []
        for start in range(0, len(points), stretch):
            steps, values = zip(*points[start : start + stretch], strict=True)
            counted = [value for value in values if value or name != "loss/disentanglement"]
            if counted:
                curve.append([fmean(steps), fmean(counted)])  # at the same step for every seed
        curves[name] = curve
    return curves


def _seconds(runs: list[dict[str, Any]], real: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Time that trainings and measurements took, added up over all, also those that ran side by side."""
    measured = [result for run in runs for kinds in run["measures"].values() for cells in kinds.values() for result in cells.values()]
    seconds = sum(result["seconds"] for result in (*measured, *real))
    return {"training": sum(run["training_seconds"] for run in runs), "measuring": seconds}


def _relative(plan: Plan, path: Path) -> str:
    return path.relative_to(plan.output).as_posix()
