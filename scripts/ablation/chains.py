"""The jobs of an ablation: drawing the data, a training by train.sh, and a list of measurements."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mosaic.files import read_json, write_text
from mosaic.training.watch.run_log import RunLog
from scripts.ablation.jobs import Job
from scripts.ablation.plan import ROOT, Plan, Run
from scripts.ablation.tasks import SCENE_COST, TOKENS_OF_REFERENCE, TOKENS_OF_TEXT_AND_TARGET, Task, are_done, write_tasks
from scripts.pocket.provenance import commit, versions

STATE = "ablation.json"  # in a run's folder: digest of what was trained, and how that ended
MEAN_REFERENCES = 2.5  # of the training data, 1 to 4 evenly mixed
BACKWARD = 3  # a training step in forward passes
START_COST = 50_000.0  # of a process that imports everything and loads the model


def data_job(plan: Plan) -> Job:
    """Draw the training data by scripts/make_pocket_world.py."""
    size, folder = plan.size, plan.data
    command = [sys.executable, str(ROOT / "scripts/make_pocket_world.py"), "--output", str(folder)]
    command += ["--num-samples", str(size.train_samples), "--num-heldout", str(size.heldout_samples)]
    return Job(
        "data",
        command,
        plan.output / "logs/data.log",
        SCENE_COST * (size.train_samples + size.heldout_samples),
        is_done=folder.is_dir,
        progress=lambda: 0.0,
        prepare=lambda: shutil.rmtree(folder.with_name(folder.name + ".partial"), ignore_errors=True),
        ended=lambda seconds: None,
    )


def train_job(plan: Plan, run: Run) -> Job:
    """Train one arm at one seed by `bash train.sh CONFIG --resume auto`."""
    tokens = TOKENS_OF_TEXT_AND_TARGET + TOKENS_OF_REFERENCE * MEAN_REFERENCES
    log = RunLog(run.folder / "metrics.jsonl")

    def progress() -> float:
        return max((entry["step"] for entry in log.entries()), default=0) / run.steps

    return Job(
        f"training of {run.name}",
        ["bash", str(ROOT / "train.sh"), str(run.config), "--resume", "auto"],
        plan.output / "logs" / f"{run.name}.log",
        START_COST + BACKWARD * run.steps * plan.size.batch_size * tokens,
        is_done=lambda: is_trained(run),
        progress=progress,
        prepare=lambda: None,
        ended=lambda seconds: _write_state(run, seconds),
    )


def measure_job(plan: Plan, name: str, tasks: Sequence[Task]) -> Job:
    """Do a list of measurements by scripts/ablation_measure.py."""
    file = plan.output / "tasks" / f"{name}.json"
    costs = {task.output: task.cost for task in tasks}
    cost = sum(costs.values())
    return Job(
        f"measuring {name}",
        [sys.executable, str(ROOT / "scripts/ablation_measure.py"), str(file)],
        plan.output / "logs" / f"{name}_measuring.log",
        START_COST + cost if tasks else 0.0,
        is_done=lambda: are_done(tasks),
        progress=lambda: sum(part for output, part in costs.items() if Path(output).is_file()) / max(cost, 1.0),
        prepare=lambda: write_tasks(file, tasks) and None,
        ended=lambda seconds: None,
    )


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
