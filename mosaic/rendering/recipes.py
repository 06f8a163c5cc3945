"""The pictures that cases ask for, and the recipe of each: everything that decides it, with a digest."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from mosaic.config.loading import Config
from mosaic.lora.files import LoraFile
from mosaic.lora.keys import find_modules
from mosaic.rendering.cases.reading import Case
from mosaic.rendering.checks import check_size, given_or_set
from mosaic.rendering.memory_presets import GGUF, MemoryPreset, gguf_file, resolve_preset
from mosaic.reports.html import page_digest_at
from mosaic.weights.digests import file_digest, weights_digest
from mosaic.weights.hub import resolve_style_lora_file

PANEL, PAGE = "_panel.png", "_report.html"  # endings of the names of files
KEY = "mosaic"  # of the PNG text that holds a recipe
NOT_DECIDING = ("name", "index", "versions", "digest")
GIVEN = ("height", "width", "num_inference_steps", "guidance_scale", "image_guidance_scale")  # by the case, or else by the config
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "pillow")


class PictureJob(NamedTuple):
    """One picture to make.

    Attributes:
        name: Beginning of the names of its files.
        case: Its case.
        recipe: What makes it, ready for JSON.
    """

    name: str
    case: Case
    recipe: dict[str, Any]


def picture_seeds(case: Case, seed: int) -> tuple[int, ...]:
    """Seeds of a case's pictures where `inference.seed` is `seed`."""
    options = case.options
    if options.seeds is not None:
        return options.seeds
    first = options.seed if options.seed is not None else seed + case.index
    return tuple(range(first, first + (options.num_images_per_prompt or 1)))


def case_jobs(case: Case, config: Config, shared: Mapping[str, Any], vae_scale_factor: int, digests: dict[Path, str]) -> list[PictureJob]:
    """The pictures of a case. A single one is named by the case's index alone, several also by their seeds.

    Args:
        case: The case.
        config: Gives what the case leaves open.
        shared: Parts of the recipe that all cases share.
        vae_scale_factor: Pixels per latent.
        digests: SHA-256 of reference pictures that have been read; grows.

    Raises:
        ValueError: The case's size does not fit the model.
        OSError: A reference picture cannot be read.
    """
    settings = config.inference
    check_size(case, config, vae_scale_factor)
    given = {name: given_or_set(case, config, name) for name in GIVEN}
    references = []
    for reference in case.references:
        if reference.path not in digests:
            digests[reference.path] = file_digest(reference.path)
        entry = {"file": reference.path.name, "name": reference.name, "strength": reference.strength}
        references.append(entry | {"sha256": digests[reference.path]})
    seeds = picture_seeds(case, settings.seed)
    jobs = []
    for seed in seeds:
        name = f"case_{case.index:03d}" + (f"_seed_{seed}" if len(seeds) > 1 else "")
        recipe = {"name": name, "index": case.index, "prompt": case.prompt, "seed": seed, **given, "references": references, **shared}
        jobs.append(PictureJob(name, case, recipe | {"digest": recipe_digest(recipe)}))
    return jobs


def shared_recipe(config: Config, model_digest: str, lora_digest: str | None, device: str) -> dict[str, Any]:
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
    return {
        "reference_size": config.data.reference_size,
        "reference_scale": settings.reference_scale,
        "reference_attention": config.model.reference_attention,
        "reference_cache": settings.reference_cache,
        "refresh_references": settings.refresh_references,
        "text_length": config.model.text_length,
        "dtype": config.model.dtype,
        "model": {"name": _public_name(config.model.pretrained), "digest": model_digest},
        "lora": None if lora_digest is None else {"name": _public_name(settings.lora), "digest": lora_digest},
        "style_lora": _style_lora(config),
        "device": device,
        "num_threads": settings.num_threads,
        "batch_size": settings.batch_size,  # the most of a batch: smaller ones, the last or those tried one by one, differ in last bits
        **{key: getattr(settings, key) for key in ("compile", "attention_backend", "step_cache", "step_cache_threshold")},
        "storage": _storage(config, preset),
        "versions": {name: importlib.metadata.version(name) for name in (*PACKAGES, *preset.packages)}
        | {"python": platform.python_version()},
    }


SAMPLING = (
    *("height", "width", "num_inference_steps", "guidance_scale", "image_guidance_scale"),
    *("reference_size", "reference_scale", "reference_attention", "reference_cache", "refresh_references"),
)


def sampling_arguments(recipes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What recipes say to `MosaicFluxPipeline.__call__`, beside the reference pictures.

    Args:
        recipes: Of pictures that have all in common but prompt, seed and references (not their number): one call makes them.
    """
    first = recipes[0]
    arguments = {key: first[key] for key in SAMPLING} | {"max_sequence_length": first["text_length"]}
    if first["lora"] is not None and first["references"]:
        arguments["reference_strength"] = [[entry["strength"] for entry in recipe["references"]] for recipe in recipes]
    prompts, generators = [recipe["prompt"] for recipe in recipes], [torch.Generator().manual_seed(recipe["seed"]) for recipe in recipes]
    return {"prompt": prompts, "generator": generators, **arguments}


def _style_lora(config: Config) -> dict[str, Any] | None:
    """The style LoRA, its keys checked before anything is loaded; None: there is none."""
    settings = config.inference
    if settings.style_lora is None:
        return None
    path = resolve_style_lora_file(settings.style_lora, settings.style_lora_weight_name)
    find_modules(LoraFile(path, "style LoRA"), str(path))
    return {"name": _public_name(settings.style_lora), "digest": weights_digest(path), "scale": settings.style_lora_scale}


def _storage(config: Config, preset: MemoryPreset) -> dict[str, Any]:
    """What of `inference.memory` changes pictures; where models wait and when they leave does not."""
    storage: dict[str, Any] = {name: getattr(preset, name) for name in ("transformer", "text_encoder_2", "vae_tiling")}
    if preset.transformer == GGUF:
        storage["gguf"] = weights_digest(gguf_file(config.inference.gguf))
    return storage


def recipe_digest(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of what decides the picture: names of files, models and references, and versions of packages do not."""
    deciding = {key: value for key, value in recipe.items() if key not in NOT_DECIDING}
    deciding["references"] = [{key: reference[key] for key in ("strength", "sha256")} for reference in recipe["references"]]
    for key in ("model", "lora"):
        deciding[key] = recipe[key] and recipe[key]["digest"]
    deciding["style_lora"] = recipe["style_lora"] and {key: recipe["style_lora"][key] for key in ("digest", "scale")}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, allow_nan=False).encode()).hexdigest()


def png_text(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The recipe as text for a PNG."""
    return {KEY: json.dumps(recipe, ensure_ascii=False, allow_nan=False)}


def read_recipe(path: Path) -> dict[str, Any] | None:
    """The recipe that a PNG carries; None where there is no such file, it is damaged, or carries none."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()
            recipe = json.loads(picture.text[KEY])
    except (OSError, ValueError, KeyError, SyntaxError, RecursionError, Image.DecompressionBombError):
        return None
    return recipe if isinstance(recipe, dict) else None


def has_digest(path: Path, digest: str) -> bool:
    """Whether a PNG is whole, and carries the recipe of that digest."""
    recipe = read_recipe(path)
    return recipe is not None and recipe.get("digest") == digest


class JobFiles(NamedTuple):
    """Files of a job. The picture is written last, so that the files of one that is there are complete."""

    picture: Path
    panel: Path
    attention: Path
    page: Path


def job_files(job: PictureJob, folder: Path) -> JobFiles:
    """Where the files of a job go; attention maps and page are there with a report only."""
    return JobFiles(*(folder / f"{job.name}{ending}" for ending in (".png", PANEL, "_attention.png", PAGE)))


def unfinished(jobs: Iterable[PictureJob], folder: Path, with_report: bool) -> list[PictureJob]:
    """The jobs of which a file is missing in the folder, is damaged, or was made by another recipe or, the page, of other points."""
    return [job for job in jobs if not _is_finished(job, job_files(job, folder), with_report)]


def page_digest(job: PictureJob) -> str:
    """SHA-256 of what decides a job's page: the recipe, and the points that its report follows."""
    points = [reference.points for reference in job.case.references]
    return hashlib.sha256(json.dumps([job.recipe["digest"], points]).encode()).hexdigest()


def _public_name(source: str) -> str:
    """A hub id as it is; of a local path the last part, since recipes travel with pictures and the rest is the machine's business."""
    return Path(source).resolve().name if Path(source).exists() else source


def _is_finished(job: PictureJob, files: JobFiles, with_report: bool) -> bool:
    pictures = [files.picture, files.panel] + [files.attention] * with_report
    with_page = not with_report or page_digest_at(files.page) == page_digest(job)
    return with_page and all(has_digest(path, job.recipe["digest"]) for path in pictures)
