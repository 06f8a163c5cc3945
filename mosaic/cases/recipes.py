"""The pictures that cases ask for, and the recipe of each: everything that decides it, with a digest."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mosaic.cases.reading import Case
from mosaic.config import Config
from mosaic.digests import file_digest
from mosaic.tokens import token_grid

KEY = "mosaic"  # of the PNG text that holds a recipe
NOT_DECIDING = ("name", "index", "versions", "digest")
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
    settings, options = config.inference, case.options
    given = {
        name: getattr(settings, name) if getattr(options, name) is None else getattr(options, name)
        for name in ("height", "width", "num_inference_steps", "guidance_scale", "image_guidance_scale")
    }
    token_grid(given["height"], given["width"], vae_scale_factor, where=f"{case.place}.height, width")
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
    """
    settings = config.inference
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
        "device": device,
        "num_threads": settings.num_threads,
        "batch_size": 1,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }


def recipe_digest(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of what decides the picture: names of files, models and references, and versions of packages do not."""
    deciding = {key: value for key, value in recipe.items() if key not in NOT_DECIDING}
    deciding["references"] = [{key: reference[key] for key in ("strength", "sha256")} for reference in recipe["references"]]
    for key in ("model", "lora"):
        deciding[key] = recipe[key] and recipe[key]["digest"]
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def png_text(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The recipe as text for a PNG."""
    return {KEY: json.dumps(recipe, ensure_ascii=False)}


def read_recipe(path: Path) -> dict[str, Any] | None:
    """The recipe that a PNG carries; None where there is no such file, it is damaged, or carries none."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()
            recipe = json.loads(picture.text[KEY])
    except (OSError, ValueError, KeyError, SyntaxError, RecursionError, Image.DecompressionBombError):
        return None
    return recipe if isinstance(recipe, dict) else None


def unfinished(jobs: Iterable[PictureJob], folder: Path, with_attention: bool) -> list[PictureJob]:
    """The jobs of which a file is missing in the folder, is damaged, or was made by another recipe."""
    return [job for job in jobs if not all(_has_digest(path, job) for path in job_files(job, folder, with_attention))]


def job_files(job: PictureJob, folder: Path, with_attention: bool) -> list[Path]:
    """Files of a job, in the order in which they are written: the picture last, so that one that is there is complete."""
    endings = ["_attention.png"] * with_attention + ["_panel.png", ".png"]
    return [folder / f"{job.name}{ending}" for ending in endings]


def _public_name(source: str) -> str:
    """A hub id as it is; of a local path the last part, since recipes travel with pictures and the rest is the machine's business."""
    return Path(source).resolve().name if Path(source).exists() else source


def _has_digest(path: Path, job: PictureJob) -> bool:
    recipe = read_recipe(path)
    return recipe is not None and recipe.get("digest") == job.recipe["digest"]
