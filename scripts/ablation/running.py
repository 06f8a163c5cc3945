"""The trial from its flags to its report: what is left to do is done, measured and drawn."""

import argparse
import dataclasses
import signal
import sys
from pathlib import Path

from safetensors.torch import load_file
from tqdm import tqdm

from mosaic.config.loading import load_config, resolved_dict
from mosaic.locks import FolderLock
from mosaic.lora.adapter import write_reference_lora
from scripts.ablation import figures
from scripts.ablation.loop import Step, child_environment, run_chains
from scripts.ablation.plan import FIRST_SEEDS, SIZES, Plan, Size, make_plan
from scripts.ablation.results import RESULTS, refuse_other_runs, write_results
from scripts.ablation.steps import cache_step, data_step, is_trained, measure_step, train_step
from scripts.ablation.tasks import are_done, real_tasks, run_tasks
from scripts.pocket.statistics import MAX_SEEDS


def chosen_size(arguments: argparse.Namespace) -> Size:
    """The size that the flags name.

    Raises:
        ValueError: A number is out of range.
    """
    names: tuple[str, ...] = ("seeds", "late_seeds", "steps", "every", "late_from", "late_steps", "selection_steps", "batch_size")
    names += ("train_samples", "cases", "checkpoint_cases", "real_scenes", "inference_steps")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    for name, value in given.items():
        least = 2 if name in ("cases", "checkpoint_cases", "real_scenes") else 1  # a covariance needs two pictures
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}.")
    size = dataclasses.replace(SIZES[arguments.size], **given)
    if given:
        size = dataclasses.replace(size, name=f"{size.name}_changed")
    if max(size.seeds, size.late_seeds) > MAX_SEEDS or arguments.parallel < 1:
        raise ValueError(f"--seeds must be at most {MAX_SEEDS} and --parallel at least 1, got {size.seeds} and {arguments.parallel}.")
    if size.steps % size.every or size.late_from % size.every or size.late_from > size.steps:
        raise ValueError(f"--steps and --late-from must be multiples of --every, and --late-from no later than --steps; got {size}.")
    return size


def stages_of(plan: Plan, parallel: int) -> list[list[list[Step]]]:
    """What is done one after the other, each in chains of steps that may run side by side."""
    output = plan.output
    chains = {
        run.name: [*([train_step(output, run)] if run.lora else []), measure_step(output, run.name, run_tasks(plan, run).values())]
        for run in plan.runs
    }
    started = {run.start.parents[2].name for run in plan.runs if run.start}
    prepared = [data_step(plan, parallel), cache_step(output, plan.data, plan.runs[0].config)]
    return [
        [[*prepared, measure_step(output, "real", real_tasks(plan).values())]],
        [chain for name, chain in chains.items() if name in started],
        [chain for name, chain in chains.items() if name not in started],
    ]


def run_trial(plan: Plan, parallel: int) -> list[str]:
    """Do what is left to do, and write what is measured, also after an interruption; returns messages of what failed."""
    stages, failures = stages_of(plan, parallel), list[str]()
    refresh = 1.0 if sys.stderr.isatty() else 60.0
    environment = child_environment(sys.executable)
    are_steps_done = [step.is_done() for chains in stages for chain in chains for step in chain]
    try:
        with tqdm(total=len(are_steps_done), initial=sum(are_steps_done), desc="ablation", unit="step", mininterval=refresh) as bar:
            for chains in stages:
                failures += run_chains(chains, parallel, environment, bar, refresh)
                if failures:
                    break  # nothing works without data or real renderings, and no late start without what it starts from
    finally:
        write_results(plan, parallel, int(environment["OMP_NUM_THREADS"]))
    return failures


def export_arms(plan: Plan, folder: Path) -> None:
    """Write the adapters of all arms at the first seed of their part in half precision, `<part>_<arm>.safetensors`."""
    for run in plan.runs:
        if run.lora and run.seed == FIRST_SEEDS[run.part] and is_trained(run):
            tensors = {key: tensor.half() for key, tensor in load_file(run.lora).items()}
            write_reference_lora(tensors, folder / f"{run.part}_{run.arm.name}.safetensors", resolved_dict(load_config(run.config)))


def describe(plan: Plan) -> str:
    """One line per run: what is left to do."""
    lines = []
    for run in plan.runs:
        is_made = run.lora is None or is_trained(run)
        state = "measured" if are_done(run_tasks(plan, run).values()) else "trained" if is_made else "not trained"
        lines.append(f"{run.name:60s} {state}")
    return "\n".join(lines)


def _end_by_signal(number: int, _: object) -> None:
    raise KeyboardInterrupt


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code: 0 done, 1 something failed. SIGTERM ends it as Ctrl-C does.

    Raises:
        OSError, ValueError: A flag will not do, or the folder is in use or of another ablation.
    """
    before = signal.signal(signal.SIGTERM, _end_by_signal)
    lock = FolderLock(arguments.output, "--output")
    try:
        with lock:
            size = chosen_size(arguments)
            lock.acquire()
            chosen = tuple(arguments.parts), tuple(arguments.arms)
            plan = make_plan(size, arguments.output, *chosen, base=arguments.base, confirmed=arguments.confirm)
            if arguments.list:
                print(describe(plan))
                return 0
            refuse_other_runs(plan)
            failures = run_trial(plan, arguments.parallel)
            if arguments.export_arms:
                export_arms(plan, arguments.export_arms)
            if (plan.output / RESULTS).is_file():
                figures.draw(plan.output / RESULTS, plan.output / "report")
                print(f"ablation: {plan.output / RESULTS}, tables and figures in {plan.output / 'report'}")
    finally:
        signal.signal(signal.SIGTERM, before)
    for failure in failures:
        print(f"ablation: failed: {failure}", file=sys.stderr)
    return 1 if failures else 0
