"""All that an ablation has found, in one JSON file: every number beside the run it comes from."""

import dataclasses
import datetime
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file

from mosaic.config.loading import load_config
from mosaic.files import read_json, write_text
from mosaic.training.watch.run_log import RunLog
from mosaic.weights.digests import file_digest
from scripts.ablation.plan import WORLD_DIGEST, Plan, Run, base_digest, judge_digest
from scripts.ablation.steps import is_trained, training_state
from scripts.ablation.tasks import (
    DIAGNOSES,
    LINES_K,
    PUBLISHED_GUIDANCE,
    Task,
    are_done,
    features_file,
    real_tasks,
    run_tasks,
    timing_tasks,
)
from scripts.pocket.frechet import frechet_distance
from scripts.pocket.provenance import commit, hardware, versions

RESULTS = "results.json"
FORMAT = "mosaic-ablation"
VERSION = 4
CURVES = ("loss/flow_matching", "loss/correspondence", "loss/disentanglement", "attention/exact", "attention/near")
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
    """Write what is there of an ablation, finished or not; runs in the folder that are not of this plan are left out."""
    timings = [entry for task in timing_tasks(plan) if (entry := _timing(plan, task))]
    real = {str(task.num_references): result for task in real_tasks(plan) if (result := task.result())}
    renderings = {task.num_references: features_file(task) for task in real_tasks(plan) if task.result()}
    runs = [_run_entry(plan, run, renderings) for run in plan.runs]
    manifest = plan.data / "manifest.parquet"
    config = load_config(plan.runs[0].config)
    results = {
        "format": FORMAT,
        "version": VERSION,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "size": dataclasses.asdict(plan.size),
        "hardware": hardware() | {"side_by_side": parallel, "threads": threads},
        "versions": versions(),
        "data": {"folder": _relative(plan, plan.data), "manifest_digest": file_digest(manifest) if manifest.is_file() else None},
        "model": {"name": config.model.pretrained, "digest": base_digest(config.model.pretrained)},
        "judge_digest": judge_digest(),
        "world_digest": WORLD_DIGEST,
        "seconds": _seconds(runs, real, timings),
        "complete": all(entry["complete"] for entry in runs) and are_done(real_tasks(plan)) and are_done(timing_tasks(plan)),
        "real": real,
        "real_frechet": pooled_frechet([(file, file) for file in renderings.values()]),
        "runs": runs,
        "timings": timings,
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
        raise ValueError(f"{path}: must be a results file of scripts/ablation.py, format {FORMAT!r} version {VERSION}.")
    return results


def _run_entry(plan: Plan, run: Run, renderings: dict[int, Path]) -> dict[str, Any]:
    tasks = run_tasks(plan, run)
    done = {task: result for task in tasks if (result := task.result())}

    def measured(kind: str, image_guidance: float | None = None) -> dict[str, dict[str, Any]]:
        return {str(t.num_references): result for t, result in done.items() if (t.kind, t.image_guidance) == (kind, image_guidance)}

    pictures = [task for task in done if task.kind == "pictures" and task.image_guidance is None and task.num_references in renderings]
    state = training_state(run) if run.lora else {"status": "finished", "seconds": 0.0}
    trained = run.lora is None or is_trained(run)
    return {
        "name": run.name,
        "parts": list(run.parts),
        "arm": run.arm.name,
        "meaning": run.arm.meaning,
        "factor": run.arm.factor,
        "seed": run.seed,
        "steps": run.steps if run.lora else 0,
        "folder": _relative(plan, run.folder),
        "config": _relative(plan, run.config),
        "config_digest": run.digest,
        "adapter_digest": file_digest(run.lora) if run.lora and trained else None,
        "settings": dict(run.arm.settings),
        "status": state.get("status", "not started"),
        "complete": trained and len(done) == len(tasks),
        "training_seconds": state.get("seconds", 0.0),
        "commit": state.get("commit"),
        "versions": state.get("versions"),
        "measures": measured("pictures"),
        "published": measured("pictures", PUBLISHED_GUIDANCE),
        "frechet": pooled_frechet([(features_file(task), renderings[task.num_references]) for task in pictures]),
        **{kind: measured(kind) for kind in DIAGNOSES},
        "lines": measured("lines").get(str(LINES_K)),
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


def _timing(plan: Plan, task: Task) -> dict[str, Any] | None:
    result = task.result()
    if result is None:
        return None
    mode = load_config(task.config).model.reference_attention
    file = _relative(plan, Path(task.output))
    return {
        "reference_attention": mode,
        "reference_cache": task.reference_cache,
        "num_references": task.num_references,
        "file": file,
        **result,
    }


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


def _seconds(runs: list[dict[str, Any]], real: dict[str, Any], timings: list[dict[str, Any]]) -> dict[str, float]:
    """Time that trainings and measurements took, added up over all, also those that ran side by side."""
    by_k = [result for run in runs for part in ("measures", "published", *DIAGNOSES) for result in run[part].values()]
    measured = [result["seconds"] for result in (*by_k, *(run["lines"] for run in runs if run["lines"]))]
    measured += [result["seconds"] for result in (*real.values(), *timings)]
    return {"training": sum(run["training_seconds"] for run in runs), "measuring": sum(measured)}


def _relative(plan: Plan, path: Path) -> str:
    return path.relative_to(plan.output).as_posix()
