"""The measurements of an ablation, each a small JSON file that is done when its digest is the wanted one."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mosaic.config.loading import load_config, resolved_dict
from mosaic.files import read_json, write_text
from mosaic.weights.digests import file_digest
from scripts.ablation.plan import FIRST_SCENES, WORLD_DIGEST, Cell, Plan, Run, base_digest, digest_of, judge_digest
from scripts.pocket.provenance import commit, hardware

VERSION = 3  # of the measurements; raise it where one changes its meaning
NOISE_SEED = 42
Kind = Literal["real", "pictures", "interventions", "target_rows", "gradients"]
DIAGNOSES: tuple[Kind, ...] = ("target_rows", "gradients")  # what says why arms differ, of runs from scratch at their end
DIAGNOSED = Cell("distinct", 2)
CHECKPOINT_CELLS = 2  # the first of a size's cells, at which checkpoints before the end are measured


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
        kind: "real": the judge on real renderings, and features to compare pictures with; "pictures": all measures of an adapter's
            pictures, and of its attention; "interventions": how much its velocity rests on what attention carries; "target_rows": where
            target tokens look; "gradients": how the losses pull at the adapter.
        output: The JSON file.
        config: Config file of the run.
        lora: The adapter; None: without references.
        regime: Of `scripts.pocket.world.REGIMES`.
        num_references: K.
        first_scene: Of the regime's held-out scenes.
        cases: Scenes.
        real_scenes: "real": renderings of other scenes, that pictures are compared with.
    """

    kind: Kind
    output: str
    config: str
    lora: str | None
    regime: str
    num_references: int
    first_scene: int
    cases: int
    real_scenes: int = 0

    def digest(self) -> str:
        """SHA-256 of everything that decides the result; the adapter must be there."""
        config = load_config(self.config)
        settings = resolved_dict(config)
        rendering = {name: value for name, value in settings["inference"].items() if name not in ("cases", "output_dir", "lora")}
        sizes = {name: settings["data"][name] for name in ("image_size", "reference_size")}
        if self.lora and config.data.reference_order != "stored":  # without which the digest is that of before the setting
            sizes["reference_order"] = config.data.reference_order
        what = {name: value for name, value in asdict(self).items() if name not in ("output", "config", "lora")}
        model = {name: value for name, value in settings["model"].items() if name.startswith("reference_")} if self.lora else None
        weights = file_digest(Path(self.lora)) if self.lora else None
        fixed = {"version": VERSION, "judge": judge_digest(), "world": WORLD_DIGEST, "noise": NOISE_SEED}
        fixed["model"] = base_digest(config.model.pretrained)
        text = settings["model"]["text_length"]
        return digest_of({**what, **fixed, "rendering": rendering, "sizes": sizes, "references": model, "lora": weights, "text": text})

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


def real_tasks(plan: Plan) -> dict[tuple[int, Cell], Task]:
    """The judge on real renderings of all scenes that pictures are drawn for, by the first scene and cell."""
    size = plan.size
    tasks: dict[tuple[int, Cell], Task] = {}
    for run in plan.runs:
        first = FIRST_SCENES[run.part]
        for cell in size.cells:
            output = str(plan.output / "real" / f"{first}_{cell}.json")
            tasks.setdefault((first, cell), Task("real", output, str(run.config), None, *cell, first, size.cases, size.real_scenes))
    return tasks


def run_tasks(plan: Plan, run: Run) -> dict[tuple[int, str, Cell], Task]:
    """The measurements of one run, by step, kind and cell: its end at all cells, its checkpoints before that on fewer scenes."""
    size, first = plan.size, FIRST_SCENES[run.part]
    tasks: dict[tuple[int, str, Cell], Task] = {}
    for step in run.measured_steps:
        folder, lora = run.folder / "evaluation" / f"step_{step:08d}", run.adapter(step)
        at_end = step == run.steps
        kinds: tuple[Kind, ...] = ("pictures", "interventions") if run.arm.trained else ("pictures",)
        for kind in kinds:
            cases = size.cases if at_end and kind == "pictures" else size.checkpoint_cases
            for cell in size.cells if at_end else size.cells[:CHECKPOINT_CELLS]:
                place = (str(folder / f"{kind}_{cell}.json"), str(run.config), str(lora) if lora else None)
                tasks[step, kind, cell] = Task(kind, *place, *cell, first, cases)
        if at_end and run.part == "scratch" and run.arm.trained:
            for kind in DIAGNOSES:
                output = str(folder / f"{kind}_{DIAGNOSED}.json")
                tasks[step, kind, DIAGNOSED] = Task(kind, output, str(run.config), str(lora), *DIAGNOSED, first, size.checkpoint_cases)
    return tasks


def are_done(tasks: Iterable[Task]) -> bool:
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
