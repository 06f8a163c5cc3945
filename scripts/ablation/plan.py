"""How large the trial is and which runs it consists of: their config files, folders and digests."""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mosaic.config.loading import Config, load_config
from mosaic.files import write_text
from mosaic.training.checkpoints.checkpoint import folder_of
from mosaic.weights.digests import file_digest, model_digest
from scripts.ablation.arms import BASELINE, DEFAULT_PARTS, Arm, all_losses, binding_arms, emergence_arms, late_arms, selection_arms
from scripts.pocket.judge import WEIGHTS as JUDGE

ROOT = Path(__file__).resolve().parents[2]
BASE_CONFIG = ROOT / "configs/pocket.json"
WARMUP = 1 / 60  # of the learning rate, as share of a run: that of configs/pocket.json
CHECKPOINTS = 10  # between two that are measured, so that a kill costs little
#: Names what a scene of a seed looks like, what it is called, and how pictures of it are judged. Put another value here when one of them
#: changes (tests/pocket/test_pocket_world.py says so): other scenes are other data, and other measurements.
WORLD_DIGEST = "a5f9221f1ee27b7e000abc1e0764e796dd2b4abca70562d19e9c2da4b07b2ba5"
TWINS_SHARE = 0.5  # of the scenes with two and more subjects that are trained on
SOURCES = 2  # runs of flow matching from which late starts start
#: First training seed of each part. What is chosen in the selection is not measured again at the seeds that chose it.
FIRST_SEEDS = {"scratch": 10, "selection": 0, "late": 20, "confirmation": 24, "binding": 30}
#: First scene of each part, counted from those of scripts/evaluate.py, on which presets were chosen before.
FIRST_SCENES = {"scratch": 300_000, "selection": 200_000, "late": 300_000, "confirmation": 400_000, "binding": 600_000}


class Cell(NamedTuple):
    """What an adapter is measured on: scenes of a regime with K references."""

    regime: str
    num_references: int

    def __str__(self) -> str:
        return f"{self.regime}_k{self.num_references}"


@dataclass(frozen=True)
class Size:
    """How much is computed.

    Attributes:
        name: For tables.
        train_samples: Scenes to train on, of 1 to `max_subjects` subjects, of which half of those with two and more are twins.
        max_subjects: Of a training scene.
        batch_size: Samples per step.
        steps: Optimizer steps from scratch.
        every: Steps between the checkpoints that are measured.
        seeds: Training seeds from scratch.
        late_from: Step of flow matching's run from which late starts start.
        late_steps: Their optimizer steps.
        late_seeds: Their training seeds; they start from flow matching's first `SOURCES` seeds in turn.
        selection_steps: Optimizer steps of the late starts among which settings are chosen; all start from flow matching's first seed.
        selection_seeds: Their training seeds.
        cases: Scenes per cell on which the end of a run is measured.
        checkpoint_cases: Scenes per cell on which its checkpoints before the end are measured, and all interventions.
        cells: What is measured.
        real_scenes: Real renderings per K, to which pictures are compared.
        inference_steps: Sampling steps.
        has_all_losses: Whether each loss and each preset runs from scratch, or only the arms whose emergence is watched.
    """

    name: str
    train_samples: int
    max_subjects: int
    batch_size: int
    steps: int
    every: int
    seeds: int
    late_from: int
    late_steps: int
    late_seeds: int
    selection_steps: int
    selection_seeds: int
    cases: int
    checkpoint_cases: int
    cells: tuple[Cell, ...]
    real_scenes: int
    inference_steps: int
    has_all_losses: bool = False


CELLS = (Cell("distinct", 2), Cell("twins", 2))
SIZES = {
    "short": Size("short", 600, 3, 8, 80, 40, 1, 40, 20, 1, 20, 1, 8, 4, CELLS, 50, 10, True),
    "long": Size(
        "long", 20_000, 3, 16, 8000, 1000, 3, 5000, 2400, 4, 800, 2, 160, 40, (*CELLS, Cell("distinct", 3), Cell("twins", 3)), 500, 10
    ),
}


@dataclass(frozen=True)
class Run:
    """One adapter: an arm at a seed.

    Attributes:
        part: The part of the trial that it belongs to.
        arm: Its settings.
        seed: Training seed.
        config: Its config file.
        folder: `training.output_dir`; the base alone has none and is named by its part.
        digest: SHA-256 of all that decides what the training makes.
        steps: Optimizer steps.
        measured_steps: Those at which it is measured; the last one is `steps`.
        start: File of the adapter that it starts from; None: a fresh one.
    """

    part: str
    arm: Arm
    seed: int
    config: Path
    folder: Path
    digest: str
    steps: int
    measured_steps: tuple[int, ...]
    start: Path | None = None

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.folder.name

    @property
    def lora(self) -> Path | None:
        """The adapter that the training writes; None for the base alone."""
        return self.folder / "lora.safetensors" if self.arm.trained else None

    def adapter(self, step: int) -> Path | None:
        """The averaged adapter of a measured step; None for the base alone."""
        if step == self.steps or not self.arm.trained:
            return self.lora
        return folder_of(self.folder / "checkpoints", step) / "ema.safetensors"


@dataclass(frozen=True)
class Plan:
    """All of a trial.

    Attributes:
        size: How much.
        output: Its folder.
        data: The data set's folder.
        runs: In the order in which they are computed: part by part, arm by arm with all its seeds, so that a trial that ends early has
            fewer arms, never fewer seeds.
    """

    size: Size
    output: Path
    data: Path
    runs: tuple[Run, ...]

    def of_part(self, part: str) -> list[Run]:
        """The runs of one part."""
        return [run for run in self.runs if run.part == part]


def make_plan(
    size: Size,
    output: Path,
    parts: Sequence[str] = DEFAULT_PARTS,
    only: Sequence[str] = (),
    base: str | None = None,
    confirmed: str | None = None,
) -> Plan:
    """Write the config files of all runs and list them.

    Args:
        size: How much.
        output: Folder of the trial.
        parts: Of `DEFAULT_PARTS`, and "binding".
        only: Names of arms; empty: all. Those runs that the chosen ones start from are there in any case.
        base: Folder of the base; None: that of configs/pocket.json.
        confirmed: Name of the late arm that is confirmed, too, beside flow matching; None: none is.

    Raises:
        FileNotFoundError, OSError: There is no such base.
        ValueError: There is no arm of a name in `only` or that of `confirmed`.
    """
    late = late_arms(size.late_steps)
    if confirmed is not None and confirmed not in {arm.name for arm in late[1:]}:
        raise ValueError(f"--confirm must be one of {', '.join(arm.name for arm in late[1:])}, got {confirmed}.")
    arms = {
        "scratch": all_losses(size.steps) if size.has_all_losses else emergence_arms(),
        "selection": selection_arms(),
        "late": late,
        "binding": binding_arms(),
    }
    names = dict.fromkeys(arm.name for part in parts for arm in arms[part])
    unknown = set(only) - names.keys()
    if unknown:
        raise ValueError(f"--arms: {', '.join(sorted(unknown))} unknown; there are {', '.join(names)}.")
    making = _Making(size, output, base)
    (flow_matching,) = (arm for arm in arms["scratch"] if arm.name == BASELINE)
    sources = [making.run("scratch", flow_matching, place) for place in range(min(SOURCES, size.seeds))]
    chosen = {part: [arm for arm in of_part if part in parts and (not only or arm.name in only)] for part, of_part in arms.items()}
    chosen["confirmation"] = [arm for arm in late if confirmed is not None and arm.name in (BASELINE, confirmed)]
    is_watched = flow_matching in chosen["scratch"]
    runs = list(sources) if is_watched or any(found for part, found in chosen.items() if part != "scratch") else []
    runs += [making.run("scratch", flow_matching, place) for place in range(len(sources), size.seeds) if is_watched]
    runs += [making.run("selection", arm, place, sources[:1]) for arm in chosen["selection"] for place in range(size.selection_seeds)]
    for part in ("late", "confirmation", "binding"):
        runs += [making.run(part, arm, place, sources) for arm in chosen[part] for place in range(size.late_seeds)]
    others = [arm for arm in chosen["scratch"] if arm != flow_matching]
    runs += [making.run("scratch", arm, place) for arm in others for place in range(size.seeds if arm.trained else 1)]
    return Plan(size, output, making.data, tuple(runs))


class _Making:
    """What all runs of a trial are made from."""

    def __init__(self, size: Size, output: Path, base: str | None) -> None:
        self.size, self.output, self.base = size, output, base
        recipe = {"samples": size.train_samples, "max_subjects": size.max_subjects, "twins_share": TWINS_SHARE}
        self.data = output / "data" / f"pocket_{size.train_samples}_{digest_of([recipe, WORLD_DIGEST])[:8]}"
        self.identity = {"data": recipe, "world": WORLD_DIGEST, "model": base_digest(base or load_config(BASE_CONFIG).model.pretrained)}

    def run(self, part: str, arm: Arm, place: int, sources: Sequence[Run] = ()) -> Run:
        """The run of an arm at the `place`-th seed of its part, which starts from one of `sources`; writes its config."""
        steps = {"scratch": self.size.steps, "selection": self.size.selection_steps}.get(part, self.size.late_steps)
        seed, common, settings = FIRST_SEEDS[part] + place, self._common_config(steps), {**arm.settings}
        source = sources[place % len(sources)] if sources else None
        start = source.adapter(self.size.late_from) if source else None
        settings |= {"training.seed": seed}
        config = load_config(common, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
        begun = [source.digest, self.size.late_from] if source else None
        digest = digest_of({"config": what_matters(config), "start": begun, "trained": arm.trained, **self.identity})
        name = f"{part}_{arm.name}_seed{seed}_{digest[:8]}" if arm.trained else f"base_{digest[:8]}"
        folder, path = self.output / "runs" / name, common.parent / f"{name}.json"
        started = {} if start is None else {"lora.pretrained": str(start)}
        write_config(path, common, {**settings, **started, "training.output_dir": str(folder)})
        measured = tuple(range(self.size.every, steps + 1, self.size.every)) if part == "scratch" and arm.trained else (steps,)
        return Run(part, arm, seed, path, folder, digest, steps, measured, start)

    def _common_config(self, steps: int) -> Path:
        """What all runs of a length share, in a file that extends the base config."""
        size, (latents, text) = self.size, caches_of(self.data)
        settings = {
            "data.root": str(self.data),
            "data.latent_cache": str(latents),
            "data.text_cache": str(text),
            "training.max_steps": steps,
            "training.batch_size": size.batch_size,
            "training.log_every": 10,
            "optimizer.warmup_steps": round(steps * WARMUP),
            "training.checkpoint_every": max(1, size.every // CHECKPOINTS),
            "training.milestone_every": size.every,
            "training.keep_checkpoints": 1,
            "training.best_metric": None,
            "training.trackers": [],
            "validation.every": None,
            "inference.num_inference_steps": size.inference_steps,
        }
        if self.base is not None:
            settings["model.pretrained"] = self.base
        path = self.output / "configs" / f"common_{digest_of(settings)[:8]}.json"
        write_config(path, BASE_CONFIG, settings)
        return path


def caches_of(data: Path) -> tuple[Path, Path]:
    """Where a data set's latents and text embeddings are."""
    return data.with_name(f"{data.name}_latents"), data.with_name(f"{data.name}_text")


def write_config(path: Path, extends: Path, settings: dict[str, Any]) -> None:
    """Write settings as a config file that extends another; an equal file is left alone."""
    values: dict[str, Any] = {"extends": os.path.relpath(extends, path.parent)}
    for key, value in settings.items():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    text = json.dumps(values, indent=2) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def what_matters(config: Config) -> dict[str, Any]:
    """The settings that decide what a training makes: no paths, logs or rendering.

    Defaults are left out, so that a setting which a later version adds, off by default, does not make finished runs strangers.
    """
    free = {"data": ("root", "num_workers", "latent_cache", "text_cache"), "model": ("pretrained",), "lora": ("pretrained",)}
    training = ("max_steps", "batch_size", "gradient_accumulation_steps", "seed", "mixed_precision")
    kept = {}
    for section, values in config.model_dump(mode="json", exclude_defaults=True).items():
        if section not in ("training", "validation", "inference"):
            kept[section] = {name: value for name, value in values.items() if name not in free.get(section, ())}
    return {**kept, "training": {name: getattr(config.training, name) for name in training}}


def digest_of(value: Any) -> str:
    """SHA-256 of JSON, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@functools.cache
def judge_digest() -> str:
    """SHA-256 of the judge's weights."""
    return file_digest(JUDGE)


base_digest = functools.cache(model_digest)
"""`model_digest`, read once."""
