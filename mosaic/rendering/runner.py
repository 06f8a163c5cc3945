"""Rendering of the pictures that cases ask for, a batch at a time, shared out over processes.

Whatever the number of processes, and however often they were interrupted: the names, pictures and manifest are the same.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from mosaic.config.loading import Config
from mosaic.files import in_one_line
from mosaic.locks import FolderLock, acquire_for_all
from mosaic.rendering.batches import plan_batches, unfinished_batches
from mosaic.rendering.cases.reading import Case, CaseFile
from mosaic.rendering.checks import check_output, lost_words, prompt_notes
from mosaic.rendering.outputs import Journal, manifest_rows, write_manifest, write_sheets
from mosaic.rendering.overview import write_overview
from mosaic.rendering.recipes import PictureJob, case_jobs, unfinished
from mosaic.rendering.rendering import CASE_ERRORS, render_batches
from mosaic.rendering.start import Start


class RunResult(NamedTuple):
    """What a run gave.

    Attributes:
        num_pictures: Finished pictures of the cases, whenever made.
        num_finished_before: Those of `num_pictures` that an earlier run had finished.
        problems: One message for every case or picture that failed.
    """

    num_pictures: int
    num_finished_before: int
    problems: list[str]


def run_cases(file: CaseFile, config: Config, state: PartialState) -> RunResult:
    """Render what is not finished of the cases, this process its share; the first process then writes the manifest and the contact sheets.

    Args:
        file: Checked cases and their pictures.
        config: The settings; `inference.memory` is not "auto" any more, see `mosaic.planning.memory_choice`.
        state: The processes.

    Returns:
        In the first process what all of them gave; in the others what is known there.

    Raises:
        FileNotFoundError, OSError, ValueError: The model, the LoRA or the settings do not fit, so that no case can be rendered; or another
            run is writing into the folder.
    """
    settings, folder = config.inference, Path(config.inference.output_dir)
    check_output(folder, file.cases, settings.seed, settings.report and settings.lora is not None)
    with FolderLock(folder, "inference.output_dir") as lock:
        acquire_for_all(lock, state)
        start = Start.check(config, state.device)
        lost = lost_words(file.cases, config)
        for note in prompt_notes(file.cases, lost) if state.is_main_process else []:
            tqdm.write(f"note: {note}", file=sys.stderr)
        jobs, problems = plan_jobs(file.cases, start, file.pictures.digests)
        todo = unfinished(jobs, folder, settings.report and start.lora_file is not None)
        state.wait_for_everyone()  # nobody writes before everybody has looked
        share = unfinished_batches(plan_batches(jobs, settings.batch_size), todo)[state.process_index :: state.num_processes]
        mine: dict[tuple[str, str], str] = {}
        if share:
            pipeline = start.load([job.recipe.prompt for batch in share for job in batch])
            names, journal = {job.name for job in todo}, Journal(folder, state.process_index)
            render_batches(share, names, pipeline, config, file.pictures, journal, show_progress=state.is_main_process)
            mine = journal.failures
        failures, ended = failures_of_all(mine)
        problems += ended
        if state.is_main_process and jobs:
            rows, missing = manifest_rows(jobs, folder, failures, lost)
            problems += missing + write_summaries(jobs, rows, folder)
            return RunResult(len(jobs) - len(missing), len(jobs) - len(todo), problems)
        return RunResult(len(jobs), len(jobs) - len(todo), problems)


def failures_of_all(mine: dict[tuple[str, str], str]) -> tuple[dict[tuple[str, str], str], list[str]]:
    """Wait for all processes; what they could not make, and a message where one of them has ended."""
    try:
        return dict(gather_object(list(mine.items()))), []
    except RuntimeError as error:  # a connection has broken: what is there is still to be told
        reason = in_one_line(error, 200, with_kind=True)
        return mine, [f"another process has ended before its pictures were made ({reason}). The same command goes on with them."]


def write_summaries(jobs: Sequence[PictureJob], rows: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
    """Write manifest, contact sheets and the page that links the reports; a message for each that could not be written."""
    problems = []
    for what, write in (
        ("the manifest", lambda: write_manifest(rows, folder)),
        ("the contact sheets", lambda: write_sheets(jobs, folder)),
        ("the overview page", lambda: write_overview(folder)),
    ):
        try:
            write()
        except CASE_ERRORS as error:
            problems.append(
                f"{folder}: {what} could not be written ({in_one_line(error, 500, with_kind=True)}). Start again when this is mended."
            )
    return problems


def plan_jobs(cases: Sequence[Case], start: Start, digests: dict[Path, str]) -> tuple[list[PictureJob], list[str]]:
    """The pictures of all cases, and a message for every case that does not fit the model.

    Args:
        cases: The cases.
        start: Of the run.
        digests: SHA-256 of the reference pictures' files as they were checked; grows by those that are missing.
    """
    jobs, problems = [], []
    for case in cases:
        try:
            jobs += case_jobs(case, start.config, start.shared, start.vae_scale_factor, digests)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return jobs, problems
