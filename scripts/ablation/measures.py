"""What a task of the ablation measures, with the models that several tasks share."""

import functools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mosaic.config.loading import Config, load_config
from mosaic.files import replacing, save_tensors, without_nan
from mosaic.method.metrics import attention_accuracy, attention_shape, pool_accuracies, pool_shapes
from mosaic.pipeline.latents import images_to_tensor
from mosaic.pipeline.options import ResolvedOptions
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.training.encoding import run_grids
from mosaic.training.validation import batch_attention_rows
from scripts.ablation.tasks import NOISE_SEED, Task, features_file
from scripts.pocket import world
from scripts.pocket.evaluation import (
    FIRST_SEED,
    MEASURES,
    MIN_VISIBLE,
    Outcome,
    generate,
    held_out_scenes,
    judge_scenes,
    pool_outcomes,
    render_references,
    scene_batch,
)
from scripts.pocket.gradients import batch_gradients, mean_pulls, paper_objective
from scripts.pocket.judge import JUDGE_SIZE, Judge, load_judge
from scripts.pocket.target_rows import TargetLooks, reading_target_rows, target_looks

BATCH_SIZE = 20
GRADIENT_BATCH_SIZE = 8
REAL_OFFSET = 500_000  # from the seeds of the scenes that are drawn to those of the renderings they are compared with
CAPTURED = "all"  # blocks whose rows are measured, in every arm, whatever it was trained on
LINES_TIMESTEP = 0.5


def measure(task: Task) -> dict[str, Any]:
    """The result of a task, JSON-able; numbers of nothing are null."""
    config = measuring_config(task)
    torch.set_num_threads(config.inference.num_threads)
    functions = {
        "real": measure_real,
        "pictures": measure_pictures,
        "lines": measure_lines,
        "target_rows": measure_target_rows,
        "gradients": measure_gradients,
        "timing": measure_timing,
    }
    start = time.monotonic()
    result = functions[task.kind](task, config)
    return {**result, "seconds": time.monotonic() - start}


def measuring_config(task: Task) -> Config:
    """The run's config, with rows read out of the same blocks in every arm, and the task's guidance."""
    guidance = [] if task.image_guidance is None else [f"inference.image_guidance_scale={task.image_guidance}"]
    return load_config(task.config, [f"loss.capture_blocks={CAPTURED}", *guidance])


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


def real_scenes(num_references: int, count: int) -> list[world.Scene]:
    """Held-out scenes that no picture is generated for."""
    first = FIRST_SEED + num_references * 1_000_000 + REAL_OFFSET
    return [world.sample_scene(first + i, "heldout", num_references, "distinct") for i in range(count)]


def picture_features(pictures: Sequence[Image.Image]) -> Tensor:
    """Features [n, d] of pictures in the judge's space, which was learnt on real renderings."""
    tensors = images_to_tensor([picture.resize((JUDGE_SIZE, JUDGE_SIZE), Image.Resampling.LANCZOS) for picture in pictures])
    return torch.cat([_judge().features(part) for part in tensors.split(64)])


def measure_real(task: Task, config: Config) -> dict[str, Any]:
    """The judge on real renderings of the scenes; keeps their features, and those of other real renderings to compare pictures with."""
    height = config.data.image_size[0]
    others = picture_features([world.render_scene(scene, height).image for scene in real_scenes(task.num_references, task.real_scenes)])
    scenes = held_out_scenes(task.num_references, task.cases)
    pictures = [world.render_scene(scene, height).image for scene in scenes]
    _write_features(features_file(task), others=others, own=picture_features(pictures))
    return pool_outcomes(judge_scenes(_judge(), pictures, scenes, MIN_VISIBLE)).to_dict()


def measure_pictures(task: Task, config: Config) -> dict[str, Any]:
    """Pictures of held-out identities, judged; and attention rows on real renderings of the same scenes at noise as in training.

    Beside the pooled measures stand those of each scene, for what is compared scene by scene; the pictures' features go to a file.
    """
    pipeline = _pipeline(config.model.pretrained, task.lora)
    scenes = held_out_scenes(task.num_references, task.cases)
    pictures = generate(pipeline, scenes, config, task.lora is not None, BATCH_SIZE, NOISE_SEED)
    outcomes = judge_scenes(_judge(), pictures, scenes)
    by_scene = {name: scene_shares([getattr(outcome, name) for outcome in outcomes]) for name in MEASURES}
    by_scene["identification_if_present"] = scene_shares([identified_if_present(outcome) for outcome in outcomes])
    result = {**pool_outcomes(outcomes).to_dict(), "attention": None, "shape": None}
    _write_features(features_file(task), own=picture_features(pictures))
    if task.lora is not None:
        generator = torch.Generator().manual_seed(NOISE_SEED)
        found = [batch_attention_rows(pipeline, scene_batch([scene], pipeline, config), config, generator) for scene in scenes]
        accuracies = [attention_accuracy(*rows) for rows in found]
        shapes = [attention_shape(rows, points) for rows, points, _ in found]
        result |= without_nan({"attention": pool_accuracies(accuracies)._asdict(), "shape": pool_shapes(shapes)._asdict()})
        by_scene |= {name: [getattr(accuracy, name) for accuracy in accuracies] for name in ("exact", "near")}
        by_scene |= {"attention_leakage": [accuracy.leakage for accuracy in accuracies]}
        by_scene |= {name: [getattr(shape, name) for shape in shapes] for name in ("entropy", "overlap")}
    return {**result, "scenes": scene_texts(by_scene)}


def scene_texts(by_scene: dict[str, list[float]]) -> dict[str, str]:
    """The numbers of all scenes of each measure as one text, which is short in a file."""
    return {name: " ".join(f"{value:.4g}" for value in values) for name, values in by_scene.items()}


def scene_shares(hits: Sequence[Sequence[bool]]) -> list[float]:
    """Share of each scene's subjects; not a number where there is none to speak of."""
    return [statistics.fmean(of_scene) if of_scene else math.nan for of_scene in hits]


def identified_if_present(outcome: Outcome) -> list[bool]:
    """Identification of those subjects of a picture whose class the judge finds in it."""
    return [hit for hit, present in zip(outcome.identification, outcome.presence, strict=True) if present]


def _write_features(path: Path, **features: Tensor) -> None:
    with replacing(path) as aside:
        save_tensors(features, aside)


def measure_lines(task: Task, config: Config) -> dict[str, Any]:
    """Points of one held-out scene, with the target token of each and the one where its row peaks, at one fixed noise (Figure 6)."""
    pipeline = _pipeline(config.model.pretrained, task.lora)
    batch = scene_batch(held_out_scenes(task.num_references, 1), pipeline, config)
    generator = torch.Generator().manual_seed(NOISE_SEED)
    rows, points, grid = batch_attention_rows(pipeline, batch, config, generator, LINES_TIMESTEP)
    peaks = rows[0].argmax(dim=-1)[points.mask[0]]
    tokens = points.global_index[0][points.mask[0]]
    reference = points.reference[0][points.mask[0]]
    per_reference = run_grids(config.data, pipeline.encoders.vae_scale_factor).reference.num_tokens
    columns = {"k": reference, "u": tokens - reference * per_reference, "v": points.target_index[0][points.mask[0]], "peak": peaks}
    return {"target_columns": grid.columns, "reference_tokens": per_reference, **{name: value.tolist() for name, value in columns.items()}}


def measure_target_rows(task: Task, config: Config) -> dict[str, Any]:
    """Where the target tokens of points look, on real renderings at noise as in training."""
    pipeline = _pipeline(config.model.pretrained, task.lora)
    generator, found = torch.Generator().manual_seed(NOISE_SEED), []
    for scene in held_out_scenes(task.num_references, task.cases):
        with reading_target_rows(pipeline.transformer) as rows:
            _, points, _ = batch_attention_rows(pipeline, scene_batch([scene], pipeline, config), config, generator)
        reference_grid = run_grids(config.data, pipeline.encoders.vae_scale_factor).reference
        found.append(target_looks(torch.stack(rows).mean(dim=0), points, reference_grid))
    by_scene = {name: [getattr(looks, name) for looks in found] for name in TargetLooks._fields}
    return {**{name: statistics.fmean(values) for name, values in by_scene.items()}, "scenes": scene_texts(by_scene)}


def measure_gradients(task: Task, config: Config) -> dict[str, Any]:
    """How the losses pull at the adapter, on real renderings at noise as in training: of all scenes together."""
    pipeline, objective = _pipeline(config.model.pretrained, task.lora), paper_objective(config)
    scenes, found = held_out_scenes(task.num_references, task.cases), []
    for start in range(0, len(scenes), GRADIENT_BATCH_SIZE):
        batch = scene_batch(scenes[start : start + GRADIENT_BATCH_SIZE], pipeline, config)
        found.append(batch_gradients(pipeline, batch, objective, NOISE_SEED, start))
    return mean_pulls(found, objective)._asdict()


def measure_timing(task: Task, config: Config) -> dict[str, Any]:
    """Median seconds per picture, one picture at a time, after one that does not count."""
    pipeline = _pipeline(config.model.pretrained, task.lora)
    scenes = held_out_scenes(task.num_references, 1)
    references, seconds = render_references(scenes[0]), []
    options = replace(ResolvedOptions.from_config(config), reference_cache=task.reference_cache)
    for repeat in range(task.cases + 1):
        start = time.perf_counter()
        pipeline(
            world.caption(scenes[0]),
            references,
            **options.arguments,
            generator=torch.Generator().manual_seed(NOISE_SEED),
        )
        if repeat:
            seconds.append(time.perf_counter() - start)
    return {"seconds_per_image": statistics.median(seconds), "repeats": seconds}
