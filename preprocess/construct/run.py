"""What preprocess/construct.py does."""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from mosaic.locks import FolderLock, acquire_for_all
from mosaic.weights.frozen import DTYPES
from mosaic.weights.numbers import without_tiny_numbers
from preprocess.construct.candidates import Candidate
from preprocess.construct.chunks import Chunks
from preprocess.construct.config import ConstructConfig, load_construct_config
from preprocess.construct.decisions import Decisions
from preprocess.construct.estimate import dry_run
from preprocess.construct.exporting import export
from preprocess.construct.page.counting import measured_yields
from preprocess.construct.page.writing import write_page
from preprocess.construct.points.stage import points_stage
from preprocess.construct.prompts.stage import prompts_stage
from preprocess.construct.references.stage import chosen_edits, references_stage
from preprocess.construct.rounds import Rounds, provenance
from preprocess.construct.segmentation.stage import segmentation_stage
from preprocess.construct.stage import Stage
from preprocess.construct.synthesis.stage import synthesis_stage
from preprocess.extractors.arguments import check_device
from preprocess.matching.run import one_thread

ROOT = Path(__file__).resolve().parents[2]
WORK, DATASET, PAGE, DOCTOR, EXPORT = "work", "dataset", "report/index.html", "report/doctor.html", 6


def stages_of(config: ConstructConfig) -> list[Stage]:
    """Stages 1 to 5."""
    dtype = DTYPES[config.dtype]
    return [
        prompts_stage(config.prompts, config.seed, dtype),
        synthesis_stage(config.synthesis, config.seed, dtype),
        segmentation_stage(config.segmentation, config.seed, dtype),
        references_stage(config.references, config.seed, dtype),
        points_stage(config.points, config.seed, dtype, lambda candidate: chosen_edits(config.references, candidate)),
    ]


def estimate(config: ConstructConfig, output: Path) -> str:
    """What the run would cost, in words; yields are those of what is there already.

    Raises:
        FileNotFoundError, ValueError: Settings do not fit.
    """
    decisions, chunks = Decisions(stages_of(config), config.prompts.limits.max_uses), Chunks(output / WORK, config.chunk_size)
    measured = None
    if chunks.folder("prompts", 0).exists():
        found = (one for chunk in range(chunks.count("prompts")) for one in chunks.candidates(decisions.stages, chunk))
        measured = measured_yields(decisions.stages, found, decisions.reasons)
    return dry_run(config, measured)


def construct(arguments: argparse.Namespace, config: ConstructConfig, state: PartialState) -> str:
    """Run the stages that are asked for; returns a summary.

    Raises:
        FileNotFoundError, ValueError: Settings, models or the folder do not fit, too few candidates pass, or another run is there.
    """
    output, stages = arguments.output, stages_of(config)
    first, last = arguments.stages
    device = check_device(arguments.device or str(state.device))
    with FolderLock(output, "--output") as lock:
        acquire_for_all(lock, state)
        rounds = Rounds(config, stages[:last], output / WORK, device, state)
        with state.main_process_first():
            if state.is_main_process:
                for stage in stages:
                    rounds.chunks.recover(stage.name)
        passing = rounds.run(stages[first - 1 : last])
        if not state.is_main_process:
            state.wait_for_everyone()  # the lock is the main process's
            return ""
        summary = finish(config, rounds, passing, output, exporting=last == EXPORT)
        state.wait_for_everyone()
    return summary


def finish(config: ConstructConfig, rounds: Rounds, passing: int, output: Path, *, exporting: bool) -> str:
    """Write the data set, if it is asked for, and the page. Returns a summary.

    Raises:
        ValueError: Fewer candidates passed than samples are wanted.
    """
    made_by = provenance(output / WORK, rounds.stages)
    tried = rounds.count * rounds.chunks.size
    enough = passing >= config.num_samples
    dataset = output / DATASET if exporting and enough else None
    if dataset is not None:
        export(config, lambda: rounds.decisions.passing(rounds.chunks, rounds.count), made_by, dataset)
    write_page(
        output / PAGE,
        rounds.stages,
        lambda: every_candidate(rounds),
        dataset,
        reasons=rounds.decisions.reasons,
        chosen=lambda candidate: chosen_edits(config.references, candidate),
        provenance=made_by,
    )
    counted = f"{passing} of {tried} candidates pass"
    if exporting and not enough:
        raise ValueError(
            f"num_samples: {config.num_samples} samples are wanted, but only {counted} after {config.max_candidates} tries for each "
            f"(max_candidates). {output / PAGE} shows what they failed for: change limits, models or prompts."
        )
    samples = "" if dataset is None else f"; {config.num_samples} samples in {dataset}"
    return f"{counted} stages 1 to {len(rounds.stages)}{samples}; look at {output / PAGE}"


def every_candidate(rounds: Rounds) -> Iterator[Candidate]:
    """All candidates of a run, in order."""
    for chunk in range(rounds.count):
        yield from rounds.chunks.candidates(rounds.stages, chunk)


def examine(dataset: Path, config: ConstructConfig, page: Path) -> int:
    """Have the doctor look at the data set; returns its exit code, 0 where it is fit for training."""
    arguments = [str(dataset), "--html", str(page), *(["--config", config.output.doctor_config] if config.output.doctor_config else [])]
    return subprocess.run([sys.executable, str(ROOT / "scripts" / "doctor.py"), *arguments], check=False).returncode


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code, after stage 6 that of the doctor. Raises as `construct`."""
    config = load_construct_config(arguments.config, arguments.set)
    if arguments.dry_run:
        print(estimate(config, arguments.output))
        return 0
    # Without `cpu`, accelerate takes several processes on a machine without an accelerator for one each.
    on_cpu = arguments.device.startswith("cpu") if arguments.device else not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))  # the first process to end waits for the last one
    try:
        with one_thread(), without_tiny_numbers():
            summary = construct(arguments, config, state)
    finally:
        state.destroy_process_group()
    if not summary:
        return 0
    print(summary)
    if arguments.stages[1] < EXPORT:
        return 0
    return examine(arguments.output / DATASET, config, arguments.output / DOCTOR)
