"""Rendering of pictures in batches, and what is written of each."""

import errno
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from mosaic.config.loading import Config
from mosaic.files import in_one_line, write_text
from mosaic.model.acceleration import set_step_cache
from mosaic.pipeline.attention_report import PictureAttention
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.rendering.cases.pictures import ReferencePicture, ReferencePictures
from mosaic.rendering.folder import is_marked, picture_files
from mosaic.rendering.outputs import Journal
from mosaic.rendering.recipe import Recipe, png_text
from mosaic.rendering.recipes import PictureJob
from mosaic.rendering.report import make_report
from mosaic.reports.figures import case_panel, reference_side, save_picture
from mosaic.reports.html import is_page

CAPTION_LETTERS = 400
FOLDER_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # after which the folder takes no other picture either
CASE_ERRORS = (ValueError, OSError, RuntimeError, MemoryError)  # RuntimeError: also that a device's memory is full


def render_batches(
    batches: Sequence[Sequence[PictureJob]],
    wanted: Collection[str],
    pipeline: MosaicFluxPipeline,
    config: Config,
    pictures: ReferencePictures,
    journal: Journal,
    show_progress: bool = True,
) -> None:
    """Render batches one after the other; what fails is written into the journal, and the next begins, unless nothing more can be written.

    Args:
        batches: The batches, each whole.
        wanted: Names of the pictures that are to be written; the others are there already and only fill their batches.
        pipeline: The pipeline.
        config: The settings.
        pictures: Gives the reference pictures.
        journal: Gets a line per picture.
        show_progress: Whether to show it.
    """
    steps = [len(batch) * batch[0].recipe.options.num_inference_steps for batch in batches]
    with tqdm(total=sum(steps), unit="step", disable=not show_progress) as progress:
        for number, batch in enumerate(batches):
            if journal.closed:
                failure = f"not begun, since {journal.path.parent} takes no more files. Start again when this is mended."
                for job in batch:
                    note_failure(journal, job, failure, wanted)
                continue
            more = f" and {len(batch) - 1} more" if len(batch) > 1 else ""
            progress.set_description(f"{batch[0].name}{more} ({number + 1} of {len(batches)})")
            render_batch(batch, wanted, pipeline, config, pictures, journal, on_step=progress.update)
            progress.update(sum(steps[: number + 1]) - progress.n)


def render_batch(
    batch: Sequence[PictureJob],
    wanted: Collection[str],
    pipeline: MosaicFluxPipeline,
    config: Config,
    pictures: ReferencePictures,
    journal: Journal,
    on_step: Callable[[int], object] = lambda _: None,
) -> None:
    """Render the pictures of a batch and write those that are wanted. Where the batch fails as a whole, each is tried alone."""
    start, readable = time.perf_counter(), {}
    for job in batch:
        try:
            readable[job.name] = read_references(job, pictures)
        except CASE_ERRORS as error:
            note_failure(journal, job, in_one_line(error, 500, with_kind=True), wanted)
    jobs = [job for job in batch if job.name in readable]
    if not any(job.name in wanted for job in jobs):
        return
    failure = ""
    try:
        sampled, attention = sample(jobs, [readable[job.name] for job in jobs], pipeline, config, on_step)
    except CASE_ERRORS as error:
        failure = in_one_line(error, 500, with_kind=True)
    if failure:  # outside of the handler, where the error would keep the tensors of the failed call
        torch.cuda.empty_cache()
        if len(jobs) == 1:
            note_failure(journal, jobs[0], failure, wanted)
            return
        tqdm.write(f"note: {len(jobs)} pictures at once failed ({failure}); they are tried one by one", file=sys.stderr)
        for job in jobs:
            if job.name in wanted:
                render_batch([job], wanted, pipeline, config, pictures, journal)
        return
    seconds = (time.perf_counter() - start) / len(jobs)
    for number, job in enumerate(jobs):
        if job.name in wanted:
            try:
                picture = checked_picture(job, sampled[number])
                write_picture(job, readable[job.name], picture, attention[number], journal, seconds)
            except CASE_ERRORS as error:
                failure = in_one_line(error, 500, with_kind=True)
                if isinstance(error, OSError):
                    folder = journal.path.parent
                    failure = f"its files cannot be written to {folder} ({failure}). Start again when this is mended."
                    journal.closed |= error.errno in FOLDER_ERRORS or not os.access(folder, os.W_OK | os.X_OK)
                note_failure(journal, job, failure, wanted)


def checked_picture(job: PictureJob, picture: Image.Image | None) -> Image.Image:
    """The picture of a job.

    Raises:
        ValueError: There is none, since its values are not finite.
    """
    if picture is None:
        scale = f"image_guidance_scale ({job.recipe.options.image_guidance_scale:g})"
        causes = f"{scale} is too large, or the weights of the model or of a LoRA are damaged"
        raise ValueError(f"the picture's values must be finite, but some are not. Likely causes: {causes}.")
    return picture


def note_failure(journal: Journal, job: PictureJob, failure: str, wanted: Collection[str]) -> None:
    """Write into the journal what went wrong with a picture, if it was to be made."""
    if job.name in wanted:
        journal.add_failure(job, failure)


def sample(
    jobs: Sequence[PictureJob],
    references: Sequence[Sequence[ReferencePicture]],
    pipeline: MosaicFluxPipeline,
    config: Config,
    on_step: Callable[[int], object],
) -> tuple[list[Image.Image | None], list[PictureAttention | None]]:
    """The pictures of jobs that have all but prompt, seed and references in common, in one call of the pipeline, and their attention.

    In the place of a picture is None where its latents or its pixels are not finite; in that of its attention where none was asked for.
    """
    recipe, settings, finite = jobs[0].recipe, config.inference, np.ones(len(jobs), dtype=bool)
    num_steps = recipe.options.num_inference_steps

    def watch(_pipeline: object, step: int, _timestep: object, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        on_step(len(jobs))
        if step == num_steps - 1:
            finite[:] = tensors["latents"].isfinite().flatten(1).all(dim=1).cpu().numpy()
        return {}

    with_lora = recipe.run.lora is not None
    set_step_cache(pipeline.transformer, settings.step_cache, settings.step_cache_threshold, num_steps)
    result = pipeline(
        reference_images=[[reference.prepared for reference in found] for found in references] if with_lora else None,
        **call_arguments([job.recipe for job in jobs]),
        output_attention=settings.report and with_lora,
        output_type="np",  # pixels of 8 bits would hide what is not finite
        callback_on_step_end=watch,
    )
    assert isinstance(result.images, np.ndarray)
    finite &= np.isfinite(result.images).all(axis=(1, 2, 3))
    pictures = pipeline.image_processor.numpy_to_pil(np.nan_to_num(result.images))
    images = [picture if fine else None for picture, fine in zip(pictures, finite, strict=True)]
    return images, result.attention or [None] * len(jobs)


def call_arguments(recipes: Sequence[Recipe]) -> dict[str, Any]:
    """What recipes say to `MosaicFluxPipeline.__call__`, beside the reference pictures.

    Args:
        recipes: Of pictures that have all in common but prompt, seed and references (not their number): one call makes them.
    """
    first = recipes[0]
    strengths = [recipe.strengths for recipe in recipes] if first.run.lora is not None and first.references else None
    return {
        "prompt": [recipe.prompt for recipe in recipes],
        "generator": [torch.Generator().manual_seed(recipe.seed) for recipe in recipes],
        "reference_strength": strengths,
        **first.options.arguments,
    }


def write_picture(
    job: PictureJob,
    references: Sequence[ReferencePicture],
    picture: Image.Image,
    attention: PictureAttention | None,
    journal: Journal,
    seconds: float,
) -> None:
    """Write a picture's files, the picture last, and its line in the journal."""
    start, text = time.perf_counter(), png_text(job.recipe)
    report = make_report(job, [reference.prepared for reference in references], picture, attention) if attention else None
    numbers = {"attention": report.numbers} if report else {}
    journal.add(job, seconds=round(seconds + time.perf_counter() - start, 3), **numbers)
    files = picture_files(job.name, journal.path.parent)
    if report:
        save_picture(report.panel, files.attention, text)
        write_text(files.page, report.page)
    else:  # those of an earlier recipe are not of this picture
        if is_marked(files.attention):
            files.attention.unlink()
        if is_page(files.page):
            files.page.unlink()
    side = reference_side(len(references))
    panel = case_panel([reference.tiles[side] for reference in references], picture, job.recipe.prompt[:CAPTION_LETTERS])
    save_picture(panel, files.panel, text)
    save_picture(picture, files.picture, text)


def read_references(job: PictureJob, pictures: ReferencePictures) -> list[ReferencePicture]:
    """The reference pictures of a job; errors are those of `ReferencePictures.use`."""
    entries = zip(job.case.image_paths, job.recipe.references, strict=True)
    return [pictures.use(path, entry.sha256) for path, entry in entries]
