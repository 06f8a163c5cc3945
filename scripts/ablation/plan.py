"""How large an ablation is and which runs it consists of: their config files, folders and digests."""

import dataclasses
import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosaic.config.loading import load_config, resolved_dict
from mosaic.files import read_json, write_text
from mosaic.weights.digests import file_digest, model_digest
from scripts.ablation.arms import BASELINE, PARTS, Arm, attention_arms, factor_arms, main_arms
from scripts.pocket.judge import WEIGHTS as JUDGE

ROOT = Path(__file__).resolve().parents[2]
BASE_CONFIG = ROOT / "configs/pocket.json"
WARMUP = 1 / 60  # of the learning rate, as share of a run: that of configs/pocket.json
#: Names what a scene of a seed looks like, what it is called, and how pictures of it are judged. Put another value here when one of them
#: changes (tests/pocket/test_pocket_world.py says so): other scenes are other data, and other measurements.
WORLD_DIGEST = "a5f9221f1ee27b7e000abc1e0764e796dd2b4abca70562d19e9c2da4b07b2ba5"


@dataclass(frozen=True)
class Size:
    """How much is computed.

    Attributes:
        name: For tables.
        train_samples: Scenes to train on, of 1 to 4 subjects.
        heldout_samples: Held-out scenes for the validation during training.
        steps: Optimizer steps of the arms and of the modes of reference attention.
        batch_size: Samples per step.
        seeds: Training seeds, from 0.
        cases: Held-out scenes per K on which every adapter is measured (one number for all: the Frechet distance depends on it).
        ks: Numbers of references.
        factor_steps: Optimizer steps of a one-factor variant and of their baseline.
        factor_seeds: Its training seeds.
        factor_ks: Its numbers of references.
        real_scenes: Real renderings per K, to which pictures are compared.
        inference_steps: Sampling steps.
        timing_ks: Numbers of references at which sampling is timed.
        timing_repeats: Pictures per timing; the median counts.
    """

    name: str
    train_samples: int
    heldout_samples: int
    steps: int
    batch_size: int
    seeds: int
    cases: int
    ks: tuple[int, ...]
    factor_steps: int
    factor_seeds: int
    factor_ks: tuple[int, ...]
    real_scenes: int
    inference_steps: int
    timing_ks: tuple[int, ...] = (1, 2, 4, 6)
    timing_repeats: int = 5


SIZES = {
    "short": Size("short", 600, 60, 80, 8, 1, 8, (1, 2, 3, 4, 5, 6), 30, 1, (2,), 200, 10, timing_repeats=3),
    "long": Size("long", 10000, 200, 1000, 8, 3, 40, (1, 2, 3, 4, 5, 6), 400, 1, (2, 4), 500, 20),
}


@dataclass(frozen=True)
class Run:
    """One adapter: an arm at a seed.

    Attributes:
        parts: The parts of the ablation that it belongs to; equal runs of two parts are one run.
        arm: Its settings.
        seed: Training seed.
        config: Its config file.
        folder: `training.output_dir`; the base alone has none and is named by its part.
        digest: SHA-256 of all that decides what the training makes.
        steps: Optimizer steps.
        ks: Numbers of references at which it is measured.
    """

    parts: tuple[str, ...]
    arm: Arm
    seed: int
    config: Path
    folder: Path
    digest: str
    steps: int
    ks: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.folder.name

    @property
    def lora(self) -> Path | None:
        """The adapter that the training writes; None for the base alone."""
        return self.folder / "lora.safetensors" if self.arm.trained else None


@dataclass(frozen=True)
class Plan:
    """All of an ablation.

    Attributes:
        size: How much.
        output: Its folder.
        data: The data set's folder.
        runs: Part by part, in a part seed by seed, so that an interrupted ablation has complete tables of fewer parts or seeds.
    """

    size: Size
    output: Path
    data: Path
    runs: tuple[Run, ...]

    def of_part(self, part: str) -> list[Run]:
        """The runs of one part."""
        return [run for run in self.runs if part in run.parts]


def make_plan(size: Size, output: Path, parts: tuple[str, ...] = PARTS, only: tuple[str, ...] = (), base: Path = BASE_CONFIG) -> Plan:
    """Write the config files of all runs and list them.

    Args:
        size: How much.
        output: Folder of the ablation.
        parts: Of `PARTS`.
        only: Names of arms; empty: all.
        base: The config file that all others extend.

    Raises:
        ValueError: There is no arm of a name in `only`, or it names variants but not their baseline, or the base config does not fit.
    """
    recipe = {"samples": size.train_samples, "heldout": size.heldout_samples}
    data = output / "data" / f"pocket_{size.train_samples}_{size.heldout_samples}_{WORLD_DIGEST[:8]}"
    model = load_config(base).model.pretrained
    transformer = read_json(Path(model) / "transformer/config.json")
    arms = {
        "main": main_arms(size.steps),
        "factors": factor_arms(size.factor_steps, transformer["num_layers"], transformer["num_single_layers"]),
        "attention": attention_arms(size.steps),
    }
    unknown = set(only) - {arm.name for part in parts for arm in arms[part]}
    if unknown:
        known = ", ".join(dict.fromkeys(arm.name for part in parts for arm in arms[part]))
        raise ValueError(f"--arms: {', '.join(sorted(unknown))} unknown; there are {known}.")
    if "factors" in parts and BASELINE not in only and set(only) & {arm.name for arm in arms["factors"]}:
        raise ValueError(f'--arms: variants are compared with the arm "{BASELINE}", which must be named beside them.')
    identity = {"data": recipe, "world": WORLD_DIGEST, "model": base_digest(model)}
    found: dict[Path, Run] = {}
    for part in sorted(parts, key=PARTS.index):
        is_factor = part == "factors"
        for seed in range(size.factor_seeds if is_factor else size.seeds):
            common = _common_config(size, is_factor, output, data, base)
            for arm in arms[part]:
                if (only and arm.name not in only) or (seed and not arm.trained):
                    continue
                run = _make_run(size, part, arm, seed, common, output, identity)
                same = found.get(run.folder)
                if same is None:
                    _write_config(run.config, common, {**arm.settings, "training.seed": seed, "training.output_dir": str(run.folder)})
                else:  # the baseline of two parts
                    run = dataclasses.replace(same, parts=(*same.parts, part), ks=tuple(sorted({*same.ks, *run.ks})))
                found[run.folder] = run
    return Plan(size, output, data, tuple(found.values()))


def _common_config(size: Size, is_factor: bool, output: Path, data: Path, base: Path) -> Path:
    """What the one-factor variants or all other runs share, in a file that extends the base config; variants are not validated."""
    steps = size.factor_steps if is_factor else size.steps
    settings = {
        "data.root": str(data),
        "training.max_steps": steps,
        "training.batch_size": size.batch_size,
        "training.log_every": 1,  # a point of a curve is the mean of many batches
        "optimizer.warmup_steps": round(steps * WARMUP),
        "training.checkpoint_every": max(1, steps // 10),
        "training.keep_checkpoints": 1,
        "training.best_metric": None,
        "training.trackers": [],
        "validation.every": None if is_factor else max(1, steps // 5),
        "validation.num_cases": 1,
        "validation.num_inference_steps": size.inference_steps,
        "inference.num_inference_steps": size.inference_steps,
    }
    path = output / "configs" / f"common_{digest_of(settings)[:8]}.json"
    _write_config(path, base, settings)
    return path


def _make_run(size: Size, part: str, arm: Arm, seed: int, common: Path, output: Path, identity: dict[str, Any]) -> Run:
    config = load_config(common, [f"{key}={json.dumps(value)}" for key, value in (*arm.settings.items(), ("training.seed", seed))])
    digest = digest_of({"config": _what_matters(resolved_dict(config)), "trained": arm.trained, **identity})
    name = f"{arm.name}_seed{seed}_{digest[:8]}" if arm.trained else f"base_{digest[:8]}"
    if part == "factors" and arm.name != BASELINE:
        name = f"factor_{name}"
    folder, path = output / "runs" / name, common.parent / f"{name}.json"
    is_factor, steps = part == "factors", config.training.max_steps
    assert steps is not None, "the common config gives the steps"
    return Run((part,), arm, seed, path, folder, digest, steps, size.factor_ks if is_factor else size.ks)


def _write_config(path: Path, extends: Path, settings: dict[str, Any]) -> None:
    """Write settings as a config file that extends another; an equal file is left alone."""
    values: dict[str, Any] = {"extends": os.path.relpath(extends, path.parent)}
    for key, value in settings.items():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    text = json.dumps(values, indent=2) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def _what_matters(resolved: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what a training makes: no paths, logs or rendering."""
    free = {"data": ("root", "num_workers"), "model": ("pretrained",)}
    kept = {
        section: {name: value for name, value in values.items() if name not in free.get(section, ())}
        for section, values in resolved.items()
        if section not in ("training", "validation", "inference")
    }
    training = ("max_steps", "batch_size", "gradient_accumulation_steps", "seed", "mixed_precision")
    return {**kept, "training": {name: resolved["training"][name] for name in training}}


def digest_of(value: Any) -> str:
    """SHA-256 of JSON, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@functools.cache
def judge_digest() -> str:
    """SHA-256 of the judge's weights."""
    return file_digest(JUDGE)


base_digest = functools.cache(model_digest)
"""`model_digest`, read once."""
