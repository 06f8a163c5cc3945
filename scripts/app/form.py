"""What a page's fields ask for: checked, and turned into a picture job with the recipe that `inference.py` would give it."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mosaic.config.loading import Config
from mosaic.config.schema import FieldError
from mosaic.files import shown
from mosaic.method.grids import token_grid
from mosaic.rendering.cases.reading import Case, CaseOptions
from mosaic.rendering.cases.references import Reference, check_text, named_prompt, read_references
from mosaic.rendering.recipe import RunRecipe
from mosaic.rendering.recipes import PictureJob, case_jobs
from scripts.app.uploads import Upload

MAX_STEPS = 100
MAX_GUIDANCE = 10.0
PLACEHOLDER = re.compile(r"<([^<>]*)>")
LABELS = {
    "seed": "Seed",
    "height": "Height",
    "width": "Width",
    "num_inference_steps": "Steps",
    "guidance_scale": "Guidance",
    "image_guidance_scale": "Image guidance",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """The fields of the page.

    Attributes:
        prompt: May speak of references as `<name>`.
        names: A name for each reference, maybe empty.
        strengths: A strength for each reference.
        seed, height, width, num_inference_steps, guidance_scale, image_guidance_scale: As in a case; None: left empty.
    """

    prompt: str
    names: tuple[str, ...] = ()
    strengths: tuple[float, ...] = ()
    seed: int | None
    height: int | None
    width: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    image_guidance_scale: float | None


class SizeLimits(NamedTuple):
    """Sides in pixels that the page offers."""

    minimum: int
    maximum: int
    step: int


def size_limits(config: Config, vae_scale_factor: int) -> SizeLimits:
    """From half to twice the sides of the config, in tokens."""
    step, sides = 2 * vae_scale_factor, (config.inference.height, config.inference.width)
    return SizeLimits(max(step, min(sides) // 2 // step * step), 2 * max(sides) // step * step, step)


def plan_picture(form: Form, uploads: Sequence[Upload], index: int, config: Config, shared: RunRecipe, vae_scale_factor: int) -> PictureJob:
    """The picture that a form asks for.

    Args:
        form: The fields.
        uploads: The reference pictures.
        index: Number of the picture, for its name.
        config: The settings.
        shared: The part of the recipe that all pictures share.
        vae_scale_factor: Pixels per latent.

    Returns:
        A job whose recipe has the digest of that of a case with the same pictures, prompt and settings.

    Raises:
        ValueError: A field does not fit; the message names it.
    """
    if not form.prompt.strip():
        raise ValueError("Prompt: is empty. Write what the picture shall show.")
    check_text(form.prompt, "Prompt")
    references = _references(form, uploads)
    if not any(form.names) and (found := PLACEHOLDER.search(form.prompt)):
        raise ValueError(f"Prompt: {found[0]} names no reference. Write {shown(found[1].strip())} into the name field of its picture.")
    case = Case(index, named_prompt(form.prompt, references, "Prompt"), references, _options(form, config, vae_scale_factor))
    digests = {reference.path: upload.sha256 for reference, upload in zip(references, uploads, strict=True)}
    return case_jobs(case, config, shared, vae_scale_factor, digests)[0]


def _references(form: Form, uploads: Sequence[Upload]) -> tuple[Reference, ...]:
    """The references with names and strengths. Their paths name no files: a folder of its own keeps equal file names apart."""
    if not uploads:
        return ()
    items = [
        {"path": f"{number}", "name": name.strip() or None, "strength": strength}
        for number, (name, strength) in enumerate(zip(form.names, form.strengths, strict=True), 1)
    ]
    try:
        references = read_references(items, "References", Path())
    except ValueError as error:  # people count from one
        raise ValueError(re.sub(r"^References\[(\d+)\]\.", lambda found: f"Reference {int(found[1]) + 1}, ", str(error))) from error
    return tuple(
        reference._replace(path=Path(f"{number}") / upload.name)
        for number, (reference, upload) in enumerate(zip(references, uploads, strict=True), 1)
    )


def _options(form: Form, config: Config, vae_scale_factor: int) -> CaseOptions:
    values = {name: getattr(form, name) for name in LABELS}
    empty = next((name for name, value in values.items() if value is None), None)
    if empty is not None:
        raise ValueError(f"{LABELS[empty]}: is empty. Enter a number.")
    limits = size_limits(config, vae_scale_factor)
    highest: dict[str, float] = {"height": limits.maximum, "width": limits.maximum, "num_inference_steps": MAX_STEPS}
    highest |= {"guidance_scale": MAX_GUIDANCE, "image_guidance_scale": MAX_GUIDANCE}
    try:
        options = CaseOptions(**values)
    except FieldError as error:
        problem = error.problem.replace(" or null", "")  # in a case it may be; here it would be an empty field
        raise ValueError(f"{LABELS[error.path.removeprefix('case.')]}: {problem}.") from error
    for name, limit in highest.items():
        if values[name] > limit:
            raise ValueError(f"{LABELS[name]}: must be at most {limit:g} on this page, got {values[name]:g}. Larger ones: inference.py.")
    token_grid(values["height"], values["width"], vae_scale_factor, where="Size")
    return options
