"""Rendering of the pictures that cases ask for, one at a time, shared out over processes.

Whatever the number of processes, and however often they were interrupted: the names, pictures and manifest are the same.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from mosaic.cases.outputs import Journal, write_manifest, write_sheets
from mosaic.cases.reading import Case
from mosaic.cases.recipes import PictureJob, case_jobs, job_files, png_text, shared_recipe, unfinished
from mosaic.config import Config
from mosaic.digests import model_digest, vae_scale_factor, weights_digest
from mosaic.figures import attention_panel, case_panel, save_picture
from mosaic.hub import require_model_name, resolve_lora_file
from mosaic.images import decode_image, prepare_reference
from mosaic.pipeline import MosaicFluxPipeline
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
    share = todo[state.process_index :: state.num_processes]
    if share:
        pipeline = load_pipeline(config, lora_file, state.device)
        render_jobs(share, pipeline, config, Journal(folder, state.process_index), show_progress=state.is_main_process)
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


def render_jobs(
    jobs: Sequence[PictureJob], pipeline: MosaicFluxPipeline, config: Config, journal: Journal, show_progress: bool = True
) -> None:
    """Render pictures one after the other; one that fails is written into the journal, and the next begins."""
    steps = [job.recipe["num_inference_steps"] for job in jobs]
    with tqdm(total=sum(steps), unit="step", disable=not show_progress) as progress:
        for number, job in enumerate(jobs):
            progress.set_description(f"{job.name} ({number + 1} of {len(jobs)})")
            try:
                render_job(job, pipeline, config, journal, on_step=progress.update)
            except CASE_ERRORS as error:
                journal.add(job, error=" ".join(f"{type(error).__name__}: {error}".split())[:500])
                torch.cuda.empty_cache()
            progress.update(sum(steps[: number + 1]) - progress.n)


def render_job(
    job: PictureJob, pipeline: MosaicFluxPipeline, config: Config, journal: Journal, on_step: Callable[[], object] = lambda: None
) -> None:
    """Render one picture and write its files, the picture last."""
    start = time.perf_counter()
    references = read_references(job)

    def count(*_: object) -> dict[str, Tensor]:
        on_step()
        return {}

    with_lora, with_attention = job.recipe["lora"] is not None, config.inference.save_attention
    result = pipeline(
        job.recipe["prompt"],
        references if with_lora else None,
        **{key: job.recipe[key] for key in ("height", "width", "num_inference_steps", "guidance_scale", "image_guidance_scale")},
        generator=torch.Generator().manual_seed(job.recipe["seed"]),
        **{key: job.recipe[key] for key in ("reference_size", "reference_scale", "reference_attention")},
        **{key: job.recipe[key] for key in ("reference_cache", "refresh_references")},
        reference_strength=[entry["strength"] for entry in job.recipe["references"]] if with_lora else None,
        max_sequence_length=job.recipe["text_length"],
        output_attention=with_attention,
        callback_on_step_end=count,
        callback_on_step_end_tensor_inputs=(),
    )
    drawn = [case_panel(references, result.images[0], job.recipe["prompt"][:CAPTION_LETTERS]), result.images[0]]
    if with_attention and with_lora:
        drawn.insert(0, draw_attention(job, references, result.images[0], result.attention[0], pipeline.vae_scale_factor))
    text = png_text(job.recipe)
    journal.add(job, seconds=round(time.perf_counter() - start, 3))
    folder = journal.path.parent
    if len(drawn) == 2:  # maps of an earlier recipe are not those of this picture
        (folder / f"{job.name}_attention.png").unlink(missing_ok=True)
    for picture, path in zip(drawn, job_files(job, folder, len(drawn) == 3), strict=True):
        save_picture(picture, path, text)


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
