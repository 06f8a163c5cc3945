"""The measurements of an ablation, each a small JSON file that is done when its digest is the wanted one."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mosaic.config.loading import load_config, resolved_dict
from mosaic.files import read_json, write_text
from mosaic.weights.digests import file_digest
from scripts.ablation.plan import WORLD_DIGEST, Plan, Run, base_digest, digest_of, judge_digest
from scripts.pocket.provenance import commit, hardware

VERSION = 2  # of the measurements; raise it where one changes its meaning
LINES_K = 3  # references of the scene whose points are drawn with lines to their peaks
NOISE_SEED = 42
PUBLISHED_GUIDANCE, PUBLISHED_KS = 1.0, (2, 4)  # the method as published has no image guidance; where the main arms are measured so, too
Kind = Literal["real", "pictures", "lines", "target_rows", "gradients", "timing"]
DIAGNOSES: tuple[Kind, ...] = ("target_rows", "gradients")
DIAGNOSED_KS = (2, 4)  # what says why the main arms differ, and where it is measured


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
        kind: "real": the judge on real renderings, and features to compare pictures with; "pictures": all measures of an adapter at one K;
            "lines": points and peaks on one scene; "target_rows": where target tokens look; "gradients": how the losses pull at
            the adapter; "timing": seconds per picture.
        output: The JSON file.
        config: Config file of the run.
        lora: The adapter; None: without references.
        num_references: K.
        cases: Scenes; "timing": pictures.
        real_scenes: "real": renderings of other scenes, that pictures are compared with.
        reference_cache: "timing": whether references are computed once.
        image_guidance: `inference.image_guidance_scale` where it is not that of the config.
    """

    kind: Kind
    output: str
    config: str
    lora: str | None
    num_references: int
    cases: int
    real_scenes: int = 0
    reference_cache: bool = False
    image_guidance: float | None = None

    def digest(self) -> str:
        """SHA-256 of everything that decides the result; the adapter must be there."""
        config = load_config(self.config)
        settings = resolved_dict(config)
        rendering = {name: value for name, value in settings["inference"].items() if name not in ("cases", "output_dir", "lora")}
        sizes = {name: settings["data"][name] for name in ("image_size", "reference_size")}
        what = {name: value for name, value in asdict(self).items() if name not in ("output", "config", "lora")}
        attention = settings["model"]["reference_attention"] if self.lora else None
        weights = file_digest(Path(self.lora)) if self.lora else None
        fixed = {"version": VERSION, "judge": judge_digest(), "world": WORLD_DIGEST, "noise": NOISE_SEED}
        fixed["model"] = base_digest(config.model.pretrained)
        text = settings["model"]["text_length"]
        return digest_of({**what, **fixed, "rendering": rendering, "sizes": sizes, "attention": attention, "lora": weights, "text": text})

    def result(self) -> dict[str, Any] | None:
        """The finished measurement, or None."""
        path, needed = Path(self.output), []
        if self.lora:
            needed.append(Path(self.lora))
        if self.kind in ("real", "pictures"):
            needed.append(features_file(self))
        if not all(file.is_file() for file in (path, *needed)):
            return None
        found = read_json(path)
        return found["result"] if found.get("digest") == self.digest() else None

    def write(self, result: dict[str, Any]) -> None:
        """Write the file aside, then rename it; the result gets the commit and the machine that it is of."""
        path = Path(self.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        made = {"commit": commit(), "processor": hardware()["processor"]}
        write_text(path, json.dumps({"digest": self.digest(), "result": {**result, **made}}, indent=1) + "\n")


def features_file(task: Task) -> Path:
    """Where the features of a task's pictures are, "own" [cases, d]; "real": also "others" [real_scenes, d], of other scenes."""
    return Path(task.output).with_suffix(".safetensors")


def real_tasks(plan: Plan) -> list[Task]:
    """One per K that any run is measured at."""
    common = str(plan.runs[0].config)
    folder, scenes = plan.output / "real", plan.size.real_scenes
    ks, cases = sorted({k for run in plan.runs for k in run.ks}), plan.size.cases
    return [Task("real", str(folder / f"k{k}.json"), common, None, k, cases, scenes) for k in ks]


def run_tasks(plan: Plan, run: Run) -> list[Task]:
    """The measurements of one run at every K, and its points and peaks."""
    folder, lora = run.folder / "evaluation", str(run.lora) if run.lora else None
    tasks = [Task("pictures", str(folder / f"k{k}.json"), str(run.config), lora, k, plan.size.cases) for k in run.ks]
    if not lora:
        return tasks
    if "main" in run.parts:
        tasks += [
            dataclasses.replace(task, output=str(folder / f"published_k{task.num_references}.json"), image_guidance=PUBLISHED_GUIDANCE)
            for task in tasks
            if task.num_references in PUBLISHED_KS
        ]
        tasks += [
            Task(kind, str(folder / f"{kind}_k{k}.json"), str(run.config), lora, k, plan.size.cases)
            for kind in DIAGNOSES
            for k in run.ks
            if k in DIAGNOSED_KS
        ]
    return [*tasks, Task("lines", str(folder / "lines.json"), str(run.config), lora, LINES_K, 1)]


def timing_tasks(plan: Plan) -> list[Task]:
    """Seconds per picture of every mode of reference attention, isolated ones also with their keys and values computed once."""
    tasks = []
    for run in plan.of_part("attention"):
        if run.seed:
            continue
        isolated = load_config(run.config).model.reference_attention == "isolated"
        for cached in (False, True) if isolated else (False,):
            for k in plan.size.timing_ks:
                name = f"timing{'_cached' if cached else ''}_k{k}.json"
                path = str(run.folder / "evaluation" / name)
                tasks.append(Task("timing", path, str(run.config), str(run.lora), k, plan.size.timing_repeats, reference_cache=cached))
    return tasks


def are_done(tasks: Sequence[Task]) -> bool:
    """Whether nothing is left to measure."""
    return all(task.result() is not None for task in tasks)


def write_tasks(path: Path, tasks: Sequence[Task]) -> Path:
    """Write a list of tasks for `read_tasks`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps([asdict(task) for task in tasks], indent=1) + "\n")
    return path


def read_tasks(path: Path) -> list[Task]:
    """Read a list of tasks.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such list.
    """
    try:
        return [Task(**entry) for entry in read_json(path)]
    except TypeError as error:
        raise ValueError(f"{path}: must be a list of tasks that scripts/ablation.py has written ({error}).") from error
