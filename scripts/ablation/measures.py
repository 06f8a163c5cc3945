"""What a task of the ablation measures, with the models that several tasks share."""

import functools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mosaic.config.loading import Config, load_config
from mosaic.files import replacing, save_tensors
from mosaic.method.correspondence import Points
from mosaic.method.metrics import attention_accuracy, attention_shape
from mosaic.model.attention_rows import CaptureRequest
from mosaic.pipeline.latents import images_to_tensor
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.training.validation import batch_attention_rows, captured_pass
from scripts.ablation.tasks import NOISE_SEED, Task, features_file
from scripts.pocket import world
from scripts.pocket.evaluation import (
    MEASURES,
    MIN_VISIBLE,
    Outcome,
    generate,
    held_out_scenes,
    judge_scenes,
    scene_batch,
)
from scripts.pocket.gradients import batch_gradients, mean_pulls, paper_objective
from scripts.pocket.interventions import changes, measure_interventions
from scripts.pocket.judge import JUDGE_SIZE, Judge, load_judge
from scripts.pocket.regimes import RegimeOutcome, judge_regime
from scripts.pocket.statistics import over_seeds_and_scenes
from scripts.pocket.target_rows import TargetLooks, target_looks

BATCH_SIZE = 20
GRADIENT_BATCH_SIZE = 8
FIRST_REAL_SCENE = 500_000  # of the renderings that pictures are compared with
CAPTURED = "all"  # blocks whose rows are measured, in every arm, whatever it was trained on


def measure(task: Task) -> dict[str, Any]:
    """The result of a task, JSON-able; numbers of nothing are null."""
    config = measuring_config(task)
    torch.set_num_threads(config.inference.num_threads)
    functions = {
        "real": measure_real,
        "pictures": measure_pictures,
        "interventions": measure_replaced_rows,
        "target_rows": measure_target_rows,
        "gradients": measure_gradients,
    }
    start = time.monotonic()
    result = functions[task.kind](task, config)
    return {**result, "seconds": time.monotonic() - start}


def measuring_config(task: Task) -> Config:
    """The run's config, with rows read out of the same blocks in every arm."""
    return load_config(task.config, [f"loss.capture_blocks={CAPTURED}"])


def task_scenes(task: Task) -> list[world.Scene]:
    """The scenes of a task."""
    return held_out_scenes(task.num_references, task.cases, task.regime, task.first_scene)


@functools.cache
def _judge() -> Judge:
    return load_judge()


@functools.lru_cache(maxsize=1)
def _pipeline(pretrained: str, lora: str | None) -> MosaicFluxPipeline:
    pipeline = MosaicFluxPipeline.from_pretrained(pretrained, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_reference_lora(lora)
    return pipeline


def picture_features(pictures: Sequence[Image.Image]) -> Tensor:
    """Features [n, d] of pictures in the judge's space, which was learnt on real renderings."""
    tensors = images_to_tensor([picture.resize((JUDGE_SIZE, JUDGE_SIZE), Image.Resampling.LANCZOS) for picture in pictures])
    return torch.cat([_judge().features(part) for part in tensors.split(64)])


def measure_real(task: Task, config: Config) -> dict[str, Any]:
    """The judges on real renderings of the scenes; keeps their features, and those of other real renderings to compare pictures with."""
    height = config.data.image_size[0]
    others = held_out_scenes(task.num_references, task.real_scenes, task.regime, FIRST_REAL_SCENE)
    scenes = task_scenes(task)
    pictures = [world.render_scene(scene, height).image for scene in scenes]
    renderings = [world.render_scene(scene, height).image for scene in others]
    _write_features(features_file(task), others=picture_features(renderings), own=picture_features(pictures))
    return pooled(judged(pictures, scenes, task.regime, MIN_VISIBLE))


def measure_pictures(task: Task, config: Config) -> dict[str, Any]:
    """Pictures of held-out identities, judged; and attention rows on real renderings of the same scenes at noise as in training.

    Beside the means stand the numbers of each scene, for what is compared scene by scene; the pictures' features go to a file.
    """
    pipeline = _pipeline(config.model.pretrained, task.lora)
    scenes = task_scenes(task)
    pictures = generate(pipeline, scenes, config, task.lora is not None, BATCH_SIZE, NOISE_SEED)
    by_scene = judged(pictures, scenes, task.regime)
    _write_features(features_file(task), own=picture_features(pictures))
    if task.lora is not None:
        generator = torch.Generator().manual_seed(NOISE_SEED)
        found = [batch_attention_rows(pipeline, scene_batch([scene], pipeline, config), config, generator) for scene in scenes]
        accuracies = [attention_accuracy(*rows) for rows in found]
        shapes = [attention_shape(rows, points) for rows, points, _ in found]
        by_scene |= {name: [getattr(accuracy, name) for accuracy in accuracies] for name in ("exact", "near")}
        by_scene |= {"attention_leakage": [accuracy.leakage for accuracy in accuracies]}
        by_scene |= {name: [getattr(shape, name) for shape in shapes] for name in ("entropy", "overlap")}
    return {**pooled(by_scene), "scenes": scene_texts(by_scene)}


def judged(pictures: Sequence[Image.Image], scenes: Sequence[world.Scene], regime: str, min_visible: float = 0.0) -> dict[str, list[float]]:
    """What the judges say of each picture, by measure: that for places, and of distinct classes that which is asked by class.

    "identification" of distinct classes is the latter's; `min_visible` is as of `judge_scenes`.
    """
    places = judge_regime(_judge(), pictures, scenes)
    by_scene = {name: [getattr(outcome, name) for outcome in places] for name in RegimeOutcome._fields}
    if regime == "distinct":
        outcomes = judge_scenes(_judge(), pictures, scenes, min_visible)
        by_scene |= {name: scene_shares([getattr(outcome, name) for outcome in outcomes]) for name in MEASURES}
        by_scene["identification_if_present"] = scene_shares([identified_if_present(outcome) for outcome in outcomes])
    return by_scene


def pooled(by_scene: Mapping[str, list[float]]) -> dict[str, dict[str, float | None]]:
    """Mean of each measure over scenes with its 95 % interval for other scenes: "share", "low" and "high", null where none is known."""
    found = {}
    for name, values in by_scene.items():
        estimate = over_seeds_and_scenes([values])
        ends = {"share": estimate.mean, "low": estimate.mean - estimate.half, "high": estimate.mean + estimate.half}
        found[name] = {key: None if math.isnan(value) else value for key, value in ends.items()}
    return found


def scene_texts(by_scene: dict[str, list[float]]) -> dict[str, str]:
    """The numbers of all scenes of each measure as one text."""
    return {name: scene_text(values) for name, values in by_scene.items()}


def scene_text(values: Sequence[float]) -> str:
    """Numbers as one text, which is short in a file."""
    return " ".join(f"{value:.6g}" for value in values)


def scene_shares(hits: Sequence[Sequence[bool]]) -> list[float]:
    """Share of each scene's subjects; not a number where there is none to speak of."""
    return [statistics.fmean(of_scene) if of_scene else math.nan for of_scene in hits]


def identified_if_present(outcome: Outcome) -> list[bool]:
    """Identification of those subjects of a picture whose class the judge finds in it."""
    return [hit for hit, present in zip(outcome.identification, outcome.presence, strict=True) if present]


def _write_features(path: Path, **features: Tensor) -> None:
    with replacing(path) as aside:
        save_tensors(features, aside)


def measure_replaced_rows(task: Task, config: Config) -> dict[str, Any]:
    """L_diff as it is, and how much each intervention adds to it, over all noise and by its thirds."""
    pipeline = _pipeline(config.model.pretrained, task.lora)
    found = changes(measure_interventions(pipeline, task_scenes(task), config, BATCH_SIZE, NOISE_SEED))
    by_scene = {name: values.tolist() for name, values in found.items()}
    return {**{name: statistics.fmean(values) for name, values in by_scene.items()}, "scenes": scene_texts(by_scene)}


def measure_target_rows(task: Task, config: Config) -> dict[str, Any]:
    """Where the target tokens of points look, on real renderings at noise as in training."""
    pipeline = _pipeline(config.model.pretrained, task.lora)
    generator, found = torch.Generator().manual_seed(NOISE_SEED), []
    for scene in task_scenes(task):
        output, points, grids = captured_pass(pipeline, scene_batch([scene], pipeline, config), config, generator, _rows_of_targets)
        assert output.target_rows is not None  # they were asked for
        found.append(target_looks(output.target_rows, points, grids.reference))
    by_scene = {name: [getattr(looks, name) for looks in found] for name in TargetLooks._fields}
    return {**{name: statistics.fmean(values) for name, values in by_scene.items()}, "scenes": scene_texts(by_scene)}


def _rows_of_targets(points: Points) -> CaptureRequest:
    return CaptureRequest(target_index=points.target_index, target_keys="all", blocks=CAPTURED)


def measure_gradients(task: Task, config: Config) -> dict[str, Any]:
    """How the losses pull at the adapter, on real renderings at noise as in training: of all scenes together."""
    pipeline, objective = _pipeline(config.model.pretrained, task.lora), paper_objective(config)
    scenes, found = task_scenes(task), []
    for start in range(0, len(scenes), GRADIENT_BATCH_SIZE):
        batch = scene_batch(scenes[start : start + GRADIENT_BATCH_SIZE], pipeline, config)
        found.append(batch_gradients(pipeline, batch, objective, NOISE_SEED, start))
    return mean_pulls(found, objective)._asdict()
