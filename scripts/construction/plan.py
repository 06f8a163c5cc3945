"""The data sets that are compared, and the runs on them."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mosaic.config.loading import load_config
from mosaic.weights.digests import file_digest
from scripts.ablation.arms import Arm
from scripts.ablation.plan import (
    BASE_CONFIG,
    WARMUP,
    WORLD_DIGEST,
    Cell,
    Run,
    base_digest,
    caches_of,
    digest_of,
    what_matters,
    write_config,
)
from scripts.ablation.tasks import Task

CELLS = tuple(Cell("distinct", k) for k in (1, 2, 3, 4))
FIRST_SCENE = 700_000  # counted from those of scripts/evaluate.py; no other trial measures these
FIRST_SEED = 40
REAL_SCENES = 500  # renderings that pictures are compared with


@dataclass(frozen=True)
class DataSet:
    """One of those that are compared.

    Attributes:
        name: For folders.
        meaning: For tables.
        root: Its folder.
    """

    name: str
    meaning: str
    root: Path


def make_runs(output: Path, data: DataSet, steps: int, seeds: int) -> list[Run]:
    """Write the configs of the trainings on a data set, which must be there, and list them; only data and seed differ between any two."""
    latents, text = caches_of(output / "data" / data.name)
    model = load_config(BASE_CONFIG).model.pretrained
    identity = {"data": file_digest(data.root / "manifest.parquet"), "world": WORLD_DIGEST, "model": base_digest(model)}
    runs = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        settings: dict[str, Any] = {
            "data.root": str(data.root),
            "data.latent_cache": str(latents),
            "data.text_cache": str(text),
            "training.max_steps": steps,
            "training.seed": seed,
            "training.log_every": 10,
            "optimizer.warmup_steps": round(steps * WARMUP),
            "training.checkpoint_every": max(1, steps // 10),
            "training.keep_checkpoints": 1,
            "training.best_metric": None,
            "training.trackers": [],
            "validation.every": None,
            "inference.num_inference_steps": 10,
        }
        path = output / "configs" / f"{data.name}_{steps}_seed{seed}.json"
        write_config(path, BASE_CONFIG, settings)
        digest = digest_of({"config": what_matters(load_config(path)), **identity})
        folder = output / "runs" / f"{data.name}_seed{seed}_{digest[:8]}"
        write_config(path, BASE_CONFIG, {**settings, "training.output_dir": str(folder)})
        runs.append(Run(data.name, Arm(data.name, data.meaning), seed, path, folder, digest, steps, (steps,)))
    return runs


def picture_tasks(run: Run, cases: int) -> dict[Cell, Task]:
    """The measurements of a run."""
    folder = run.folder / "evaluation"
    place = (str(run.config), str(run.lora))
    return {cell: Task("pictures", str(folder / f"{cell}.json"), *place, *cell, FIRST_SCENE, cases) for cell in CELLS}


def real_tasks(output: Path, config: Path, cases: int) -> dict[Cell, Task]:
    """The judge on real renderings of the same scenes."""
    folder = output / "real"
    return {cell: Task("real", str(folder / f"{cell}.json"), str(config), None, *cell, FIRST_SCENE, cases, REAL_SCENES) for cell in CELLS}


def described(data: DataSet) -> dict[str, Any]:
    """A data set for the results file."""
    return {**asdict(data), "root": data.root.as_posix(), "manifest_digest": file_digest(data.root / "manifest.parquet")}
