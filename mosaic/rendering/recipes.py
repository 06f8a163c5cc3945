"""The pictures that cases ask for, each with its recipe and its files."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mosaic.config.loading import Config
from mosaic.lora.files import LoraFile
from mosaic.lora.keys import find_modules
from mosaic.lora.scales import peft_config
from mosaic.pipeline.options import ResolvedOptions
from mosaic.rendering.cases.reading import Case
from mosaic.rendering.checks import check_size
from mosaic.rendering.folder import PictureFiles, picture_files, picture_names
from mosaic.rendering.memory_presets import MemoryPreset, gguf_file, resolve_preset
from mosaic.rendering.recipe import Recipe, ReferenceEntry, RunRecipe, StyleWeights, Weights, has_digest
from mosaic.reports.html import page_digest_at
from mosaic.weights.digests import file_digest, weights_digest
from mosaic.weights.hub import resolve_style_lora_file

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "pillow")


class PictureJob(NamedTuple):
    """One picture to make.

    Attributes:
        name: Beginning of the names of its files.
        case: Its case.
        recipe: What makes it.
    """

    name: str
    case: Case
    recipe: Recipe


def case_jobs(case: Case, config: Config, shared: RunRecipe, vae_scale_factor: int, digests: dict[Path, str]) -> list[PictureJob]:
    """The pictures of a case.

    Args:
        case: The case.
        config: Gives what the case leaves open.
        shared: The part of the recipe that all cases share.
        vae_scale_factor: Pixels per latent.
        digests: SHA-256 of reference pictures that have been read; grows.

    Raises:
        ValueError: The case's size does not fit the model.
        OSError: A reference picture cannot be read.
    """
    options = ResolvedOptions.from_config(config).given(case.options)
    check_size(options, case, vae_scale_factor)
    references = []
    for reference in case.references:
        if reference.path not in digests:
            digests[reference.path] = file_digest(reference.path)
        references.append(ReferenceEntry(reference.path.name, reference.name, reference.strength, digests[reference.path]))
    jobs = []
    for name, seed in picture_names(case, config.inference.seed).items():
        recipe = Recipe(
            name=name, index=case.index, prompt=case.prompt, seed=seed, options=options, references=tuple(references), run=shared
        )
        jobs.append(PictureJob(name, case, recipe))
    return jobs


def shared_recipe(config: Config, model_digest: str, lora_digest: str | None, device: str) -> RunRecipe:
    """The part of the recipe that all cases share.

    Args:
        config: The settings.
        model_digest: Of `model.pretrained`.
        lora_digest: Of `inference.lora`; None: there is none.
        device: Type of the device, such as "cpu".

    Raises:
        FileNotFoundError, OSError, ValueError: `inference.style_lora` is not there, or its keys are not those of a FLUX LoRA.
        FileNotFoundError, ValueError: The memory settings exclude each other, or need what is not there.
    """
    settings, preset = config.inference, resolve_preset(config)
    versions = {name: importlib.metadata.version(name) for name in (*PACKAGES, *preset.packages)}
    return RunRecipe(
        dtype=config.model.dtype,
        model=Weights(_public_name(config.model.pretrained), model_digest),
        lora=None if settings.lora is None or lora_digest is None else Weights(_public_name(settings.lora), lora_digest),
        style_lora=_style_lora(config),
        device=device,
        num_threads=settings.num_threads,
        batch_size=settings.batch_size,
        compile=settings.compile,
        attention_backend=settings.attention_backend,
        step_cache=settings.step_cache,
        step_cache_threshold=settings.step_cache_threshold,
        storage=_storage(config, preset),
        versions=versions | {"python": platform.python_version()},
    )


def _style_lora(config: Config) -> StyleWeights | None:
    """The style LoRA, its keys and metadata checked before anything is loaded; None: there is none."""
    settings = config.inference
    if settings.style_lora is None:
        return None
    path = resolve_style_lora_file(settings.style_lora, settings.style_lora_weight_name)
    file = LoraFile(path, "style LoRA")
    peft_config(file.metadata, str(path))
    find_modules(file, str(path))
    return StyleWeights(_public_name(settings.style_lora), weights_digest(path), settings.style_lora_scale)


def _storage(config: Config, preset: MemoryPreset) -> dict[str, Any]:
    """What of `inference.memory` changes pictures; where models wait and when they leave does not."""
    storage: dict[str, Any] = {name: getattr(preset, name) for name in ("transformer", "text_encoder_2", "vae_tiling")}
    if config.inference.gguf is not None:
        storage["gguf"] = weights_digest(gguf_file(config.inference.gguf))
    return storage


def unfinished(jobs: Iterable[PictureJob], folder: Path, with_report: bool) -> list[PictureJob]:
    """The jobs of which a file is missing in the folder, is damaged, or was made by another recipe or, the page, of other points."""
    return [job for job in jobs if not _is_finished(job, picture_files(job.name, folder), with_report)]


def page_digest(job: PictureJob) -> str:
    """SHA-256 of what decides a job's page: the recipe, and the points that its report follows."""
    points = [reference.points for reference in job.case.references]
    return hashlib.sha256(json.dumps([job.recipe.digest, points]).encode()).hexdigest()


def _public_name(source: str) -> str:
    """A hub id as it is; of a local path the last part, since recipes travel with pictures and the rest is the machine's business."""
    return Path(source).resolve().name if Path(source).exists() else source


def _is_finished(job: PictureJob, files: PictureFiles, with_report: bool) -> bool:
    pictures = [files.picture, files.panel] + [files.attention] * with_report
    with_page = not with_report or page_digest_at(files.page) == page_digest(job)
    return with_page and all(has_digest(path, job.recipe.digest) for path in pictures)
