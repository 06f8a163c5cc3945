"""Rendering of the pictures that cases ask for, a batch at a time, shared out over processes.

Whatever the number of processes, and however often they were interrupted: the names, pictures and manifest are the same.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from mosaic.acceleration import accelerate, set_step_cache
from mosaic.cases.batches import plan_batches, unfinished_batches
from mosaic.cases.outputs import Journal, write_manifest, write_sheets
from mosaic.cases.reading import Case
from mosaic.cases.recipes import PictureJob, case_jobs, job_files, png_text, shared_recipe, unfinished
from mosaic.config import Config
from mosaic.digests import model_digest, vae_scale_factor, weights_digest
from mosaic.figures import attention_panel, case_panel, save_picture
from mosaic.hub import require_model_name, resolve_lora_file
from mosaic.images import decode_image, prepare_reference
from mosaic.pipeline import MosaicFluxPipeline, MosaicPipelineOutput
from mosaic.reference_cache import refresh_interval
from mosaic.tokens import token_grid

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CAPTION_LETTERS = 400
CASE_ERRORS = (ValueError, OSError, RuntimeError, MemoryError)  # RuntimeError: also that a device's memory is full


class RunResult(NamedTuple):
    """What a run gave.

    Attributes:
        num_pictures: Finished pictures of the cases, whenever made.
        num_finished_before: Those of them that were there already.
        problems: One message for every case or picture that failed.
    """

    num_pictures: int
    num_finished_before: int
    problems: list[str]


def run_cases(cases: Sequence[Case], config: Config, state: PartialState) -> RunResult:
    """Render what is not finished of the cases, this process its share; the first process then writes the manifest and the contact sheets.

    Args:
        cases: Checked cases.
        config: The settings.
        state: The processes.

    Returns:
        In the first process what all of them gave; in the others what is known there.

    Raises:
        FileNotFoundError, OSError, ValueError: The model, the LoRA or the settings do not fit, so that no case can be rendered.
    """
    settings, folder = config.inference, Path(config.inference.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"inference.output_dir: must be a folder, but {folder} is a file.")
    lora_file = settings.lora and resolve_lora_file(settings.lora, settings.lora_weight_name)
    jobs, problems = plan_jobs(cases, config, lora_file, state.device.type)
    todo = unfinished(jobs, folder, settings.save_attention and lora_file is not None)
    state.wait_for_everyone()  # nobody writes before everybody has looked
    share = unfinished_batches(plan_batches(jobs, settings.batch_size), todo)[state.process_index :: state.num_processes]
    if share:
        pipeline = load_pipeline(config, lora_file, state.device)
        accelerate(pipeline.transformer, settings, state.device)
        names = {job.name for job in todo}
        render_batches(share, names, pipeline, config, Journal(folder, state.process_index), show_progress=state.is_main_process)
    state.wait_for_everyone()
    if state.is_main_process and jobs:
        failures = write_manifest(jobs, folder)
        write_sheets(jobs, folder)
        return RunResult(len(jobs) - len(failures), len(jobs) - len(todo), problems + failures)
    return RunResult(len(jobs), len(jobs) - len(todo), problems)


def plan_jobs(cases: Sequence[Case], config: Config, lora_file: Path | None, device: str) -> tuple[list[PictureJob], list[str]]:
    """The pictures of all cases, and a message for every case that does not fit the model; nothing is loaded.

    Raises:
        FileNotFoundError, OSError, ValueError: The model or the settings do not fit.
    """
    name, settings, size = config.model.pretrained, config.inference, config.data.reference_size
    require_model_name(name)
    factor = vae_scale_factor(name)
    token_grid(settings.height, settings.width, factor, where="inference.height, inference.width")
    token_grid(size, size, factor, where="data.reference_size")
    refresh_interval(settings.reference_cache, settings.refresh_references, config.model.reference_attention)
    shared = shared_recipe(config, model_digest(name), lora_file and weights_digest(lora_file), device)
    jobs, problems, digests = [], [], {}
    for case in cases:
        try:
            jobs += case_jobs(case, config, shared, factor, digests)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return jobs, problems


def load_pipeline(config: Config, lora_file: Path | None, device: torch.device) -> MosaicFluxPipeline:
    """The pipeline with its reference LoRA, on its device."""
    pipeline = MosaicFluxPipeline.from_pretrained(config.model.pretrained, dtype=DTYPES[config.model.dtype])
    if lora_file is not None:
        pipeline.load_reference_lora(lora_file)
    if device.type != "cpu" and config.inference.cpu_offload:
        pipeline.enable_model_cpu_offload(device=device)
    elif device.type != "cpu":
        pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def render_batches(
    batches: Sequence[Sequence[PictureJob]],
    wanted: Collection[str],
    pipeline: MosaicFluxPipeline,
    config: Config,
    journal: Journal,
    show_progress: bool = True,
) -> None:
    """Render batches one after the other; what fails is written into the journal, and the next begins.

    Args:
        batches: The batches, each whole.
        wanted: Names of the pictures that are to be written; the others are there already and only fill their batches.
        pipeline: The pipeline.
        config: The settings.
        journal: Gets a line per picture.
        show_progress: Whether to show it.
    """
    steps = [len(batch) * batch[0].recipe["num_inference_steps"] for batch in batches]
    with tqdm(total=sum(steps), unit="step", disable=not show_progress) as progress:
        for number, batch in enumerate(batches):
            more = f" and {len(batch) - 1} more" if len(batch) > 1 else ""
            progress.set_description(f"{batch[0].name}{more} ({number + 1} of {len(batches)})")
            render_batch(batch, wanted, pipeline, config, journal, on_step=progress.update)
            progress.update(sum(steps[: number + 1]) - progress.n)


def render_batch(
    batch: Sequence[PictureJob],
    wanted: Collection[str],
    pipeline: MosaicFluxPipeline,
    config: Config,
    journal: Journal,
    on_step: Callable[[int], object] = lambda _: None,
) -> None:
    """Render the pictures of a batch and write those that are wanted. Where the batch fails as a whole, each is tried alone."""
    start, readable = time.perf_counter(), {}
    for job in batch:
        try:
            readable[job.name] = read_references(job)
        except CASE_ERRORS as error:
            note_failure(journal, job, error, wanted)
    jobs = [job for job in batch if job.name in readable]
    if not any(job.name in wanted for job in jobs):
        return
    try:
        result = sample(jobs, [readable[job.name] for job in jobs], pipeline, config, on_step)
    except CASE_ERRORS as error:
        torch.cuda.empty_cache()
        if len(jobs) == 1:
            note_failure(journal, jobs[0], error, wanted)
            return
        tqdm.write(f"note: {len(jobs)} pictures at once failed ({_in_one_line(error)}); they are tried one by one", file=sys.stderr)
        for job in jobs:
            if job.name in wanted:
                render_batch([job], wanted, pipeline, config, journal)
        return
    seconds = (time.perf_counter() - start) / len(jobs)
    for number, job in enumerate(jobs):
        if job.name in wanted:
            attention = result.attention[number] if result.attention else None
            try:
                write_picture(job, readable[job.name], result.images[number], attention, pipeline.vae_scale_factor, journal, seconds)
            except CASE_ERRORS as error:
                note_failure(journal, job, error, wanted)


def note_failure(journal: Journal, job: PictureJob, error: Exception, wanted: Collection[str]) -> None:
    """Write into the journal what went wrong with a picture, if it was to be made."""
    if job.name in wanted:
        journal.add(job, error=_in_one_line(error))


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def sample(
    jobs: Sequence[PictureJob],
    references: Sequence[Sequence[Image.Image]],
    pipeline: MosaicFluxPipeline,
    config: Config,
    on_step: Callable[[int], object],
) -> MosaicPipelineOutput:
    """The pictures of jobs that have all but prompt, seed and references in common, in one call of the pipeline."""
    recipe, settings = jobs[0].recipe, config.inference

    def count(*_: object) -> dict[str, Tensor]:
        on_step(len(jobs))
        return {}

    with_lora = recipe["lora"] is not None
    set_step_cache(pipeline.transformer, settings.step_cache, settings.step_cache_threshold, recipe["num_inference_steps"])
    return pipeline(
        [job.recipe["prompt"] for job in jobs],
        [list(pictures) for pictures in references] if with_lora else None,
        **{key: recipe[key] for key in ("height", "width", "num_inference_steps", "guidance_scale", "image_guidance_scale")},
        generator=[torch.Generator().manual_seed(job.recipe["seed"]) for job in jobs],
        **{key: recipe[key] for key in ("reference_size", "reference_scale", "reference_attention")},
        **{key: recipe[key] for key in ("reference_cache", "refresh_references")},
        reference_strength=[[entry["strength"] for entry in job.recipe["references"]] for job in jobs] if with_lora else None,
        max_sequence_length=recipe["text_length"],
        output_attention=settings.save_attention and with_lora,
        callback_on_step_end=count,
        callback_on_step_end_tensor_inputs=(),
    )


def write_picture(
    job: PictureJob,
    references: Sequence[Image.Image],
    picture: Image.Image,
    attention: Tensor | None,
    vae_scale_factor: int,
    journal: Journal,
    seconds: float,
) -> None:
    """Write a picture's files, the picture last, and its line in the journal."""
    start = time.perf_counter()
    drawn = [case_panel(references, picture, job.recipe["prompt"][:CAPTION_LETTERS]), picture]
    if attention is not None:
        drawn.insert(0, draw_attention(job, references, picture, attention, vae_scale_factor))
    text = png_text(job.recipe)
    journal.add(job, seconds=round(seconds + time.perf_counter() - start, 3))
    folder = journal.path.parent
    if len(drawn) == 2:  # maps of an earlier recipe are not those of this picture
        (folder / f"{job.name}_attention.png").unlink(missing_ok=True)
    for drawing, path in zip(drawn, job_files(job, folder, len(drawn) == 3), strict=True):
        save_picture(drawing, path, text)


def read_references(job: PictureJob) -> list[Image.Image]:
    """The reference pictures of a job.

    Raises:
        ValueError: A file is not the one that was checked.
        OSError: A file is gone.
    """
    pictures = []
    for path, entry in zip(job.case.image_paths, job.recipe["references"], strict=True):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ValueError(f"{path}: has changed since the cases were checked. Start again.")
        pictures.append(decode_image(data, str(path)))
    return pictures


def draw_attention(
    job: PictureJob, references: Sequence[Image.Image], picture: Image.Image, attention: Tensor, vae_scale_factor: int
) -> Image.Image:
    """The attention maps of a picture."""
    size = job.recipe["reference_size"]
    prepared = [prepare_reference(reference, size, job.recipe["reference_scale"]) for reference in references]
    reference_grid = token_grid(size, size, vae_scale_factor)
    return attention_panel(prepared, picture, attention, reference_grid, token_grid(picture.height, picture.width, vae_scale_factor))
