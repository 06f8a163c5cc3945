"""The steps of a trial: drawing and encoding the data, a training by train.sh, and a list of measurements."""

import json
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mosaic.data.cache.tensors import INDEX, NAMES
from mosaic.files import read_json, write_text
from scripts.ablation.loop import Step
from scripts.ablation.plan import ROOT, TWINS_SHARE, Plan, Run, caches_of
from scripts.ablation.tasks import Task, are_done, write_tasks
from scripts.pocket.provenance import commit, versions

STATE = "ablation.json"  # in a run's folder: digest of what was trained, and how that ended


def data_step(plan: Plan, workers: int) -> Step:
    """Draw the training data by scripts/make_pocket_world.py in some processes."""
    size, folder = plan.size, plan.data
    command = [sys.executable, str(ROOT / "scripts/make_pocket_world.py"), "--output", str(folder)]
    command += ["--num-samples", str(size.train_samples), "--max-subjects", str(size.max_subjects), "--twins-share", str(TWINS_SHARE)]
    command += ["--workers", str(workers)]
    partial = folder.with_name(folder.name + ".partial")
    return Step("data", command, plan.output / "logs/data.log", folder.is_dir, lambda: shutil.rmtree(partial, ignore_errors=True))


def cache_step(output: Path, data: Path, config: Path) -> Step:
    """Encode a data set once by preprocess/cache.py, which all trainings read: the same numbers in less time."""
    command = [sys.executable, str(ROOT / "preprocess/cache.py"), str(config)]

    def is_cached() -> bool:
        return all((folder / name).is_file() for folder in caches_of(data) for name in (INDEX, NAMES))

    return Step(f"cache of {data.name}", command, output / f"logs/{data.name}_cache.log", is_cached)


def train_step(output: Path, run: Run) -> Step:
    """Train one arm at one seed by `bash train.sh CONFIG --resume auto`."""
    command = ["bash", str(ROOT / "train.sh"), str(run.config), "--resume", "auto"]
    log = output / "logs" / f"{run.name}.log"
    return Step(f"training of {run.name}", command, log, lambda: is_trained(run), ended=lambda seconds: _write_state(run, seconds))


def measure_step(output: Path, name: str, tasks: Collection[Task]) -> Step:
    """Do measurements by scripts/ablation_measure.py."""
    file = output / "tasks" / f"{name}.json"
    command = [sys.executable, str(ROOT / "scripts/ablation_measure.py"), str(file)]
    log = output / "logs" / f"{name}_measuring.log"
    return Step(f"measuring {name}", command, log, lambda: are_done(tasks), lambda: write_tasks(file, list(tasks)))


def training_state(run: Run) -> dict[str, Any]:
    """How a training stands: "digest", "status" ("finished" or "stopped") and "seconds"; empty before its first start."""
    path = run.folder / STATE
    return read_json(path) if path.is_file() else {}


def is_trained(run: Run) -> bool:
    """Whether the adapter is there, and of this config."""
    state = training_state(run)
    return state.get("digest") == run.digest and state.get("status") == "finished" and run.lora is not None and run.lora.is_file()


def _write_state(run: Run, seconds: float) -> None:
    """Add the seconds of a start; the trainer writes the adapter last, so that its presence means the end."""
    before = training_state(run).get("seconds", 0.0)
    status = "finished" if run.lora is not None and run.lora.is_file() else "stopped"
    run.folder.mkdir(parents=True, exist_ok=True)
    state = {"digest": run.digest, "status": status, "seconds": before + seconds, "commit": commit(), "versions": versions()}
    write_text(run.folder / STATE, json.dumps(state, indent=1) + "\n")
