"""Render a cases file: `python inference.py` draws example_cases.json with the shipped pocket weights, from any current directory.

FLUX.1-dev: `python inference.py --config configs/flux_dev.json`. On several GPUs or machines: `accelerate launch inference.py ...`.
Per case: the picture with its recipe, a panel references | result (all of them in overview.png), and with --report a page that shows where
each reference looks, linked by report.html; manifest.jsonl has a line per picture. Cases and pictures are checked before the model
loads. A bad case does not stop the others: it is reported, and the exit code is 1. Finished pictures are skipped when started again.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mosaic.commands import USERS_ERROR, command, importing, is_meant, printable
from mosaic.config.loading import Config, load_config
from mosaic.files import in_one_line
from mosaic.rendering.cases.reading import Case, CaseFile, read_cases

if TYPE_CHECKING:
    from accelerate import PartialState

    from mosaic.rendering.checks import Checked
    from mosaic.rendering.runner import RunResult

ROOT = Path(__file__).resolve().parent
DEFAULT_CONFIG = ROOT / "configs" / "pocket.json"
MEMORY = ("none", "auto", "80gb", "48gb", "24gb", "16gb", "12gb")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; every flag but --config and --set stands for one setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="JSON file; its paths start at the current directory (default: this repository's pocket.json)")
    parser.add_argument("--model", help="model.pretrained: a diffusers FLUX folder or hub id")
    parser.add_argument("--lora", help="inference.lora: a .safetensors file, a folder or a hub id")
    parser.add_argument("--style-lora", help="inference.style_lora: a LoRA for text and target; a .safetensors file, a folder or a hub id")
    parser.add_argument("--style-lora-scale", type=float, help="inference.style_lora_scale: factor on it")
    parser.add_argument("--cases", help="inference.cases: the cases file")
    parser.add_argument("--output-dir", help="inference.output_dir: where pictures go")
    parser.add_argument("--seed", type=int, help="inference.seed")
    parser.add_argument("--steps", type=int, help="inference.num_inference_steps")
    parser.add_argument(
        "--reference-cache", action="store_true", help="inference.reference_cache: compute isolated references once (exact)"
    )
    parser.add_argument("--refresh-references", type=int, metavar="N", help="inference.refresh_references: every N steps (approximate)")
    parser.add_argument("--report", action="store_true", help="also write pages on where each reference looks")
    parser.add_argument("--memory", choices=MEMORY, help="inference.memory: fit a card of this size, or what memory is free (auto)")
    parser.add_argument("--check", action="store_true", help="only check the cases, their pictures and sizes, and the output folder")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override one setting; may be repeated")
    return parser.parse_args(argv)


def pocket_inputs() -> list[str]:
    """The inputs of the default config as `--set` overrides that find them in this repository from any current directory."""
    config = load_config(DEFAULT_CONFIG)
    model, settings = config.model.pretrained, config.inference
    inputs = {"model.pretrained": model, "inference.lora": settings.lora, "inference.cases": settings.cases}
    return [f"{key}={json.dumps(os.path.relpath(ROOT / value))}" for key, value in inputs.items() if value is not None]


def overrides(arguments: argparse.Namespace) -> list[str]:
    """The flags as `--set` overrides; flags win over --set."""
    settings = {
        "model.pretrained": arguments.model,
        "inference.lora": arguments.lora,
        "inference.style_lora": arguments.style_lora,
        "inference.style_lora_scale": arguments.style_lora_scale,
        "inference.cases": arguments.cases,
        "inference.output_dir": arguments.output_dir,
        "inference.seed": arguments.seed,
        "inference.num_inference_steps": arguments.steps,
        "inference.reference_cache": arguments.reference_cache or None,
        "inference.refresh_references": arguments.refresh_references,
        "inference.report": arguments.report or None,
        "inference.memory": arguments.memory,
    }
    return arguments.set + [f"{key}={json.dumps(value)}" for key, value in settings.items() if value is not None]


def is_first_process() -> bool:
    """Whether this is the process that speaks, asked before the processes know of each other."""
    return os.environ.get("RANK", "0") == "0"


def run(config: Config, file: CaseFile) -> "RunResult":
    """Render the cases of a file, this process its share; see `mosaic.rendering.runner.run_cases`."""
    from datetime import timedelta

    with importing():
        import torch
        from accelerate import PartialState

        from mosaic.rendering.checks import check_run
        from mosaic.rendering.runner import run_cases

    # Without `cpu`, accelerate takes several processes on a machine without an accelerator for one each. The first process to end waits
    # for the last one, however long that takes.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(config.inference.num_threads)
    try:
        check_run(file.cases, config)  # all that can be known before a download
        if config.inference.memory == "auto":
            config = choose_memory(config, file.cases, state)
        return run_cases(file, config, state)
    finally:
        torch.set_num_threads(num_threads)
        state.destroy_process_group()


def check(config: Config, cases: list[Case]) -> "Checked":
    """What `--check` finds beyond the cases file: cases whose size does not fit the model, and prompts that are not read whole.

    Raises:
        FileNotFoundError, ValueError: See `mosaic.rendering.checks.check_run` and `adapter_notes`.
    """
    from mosaic.rendering.checks import Checked, adapter_notes, check_memory, check_run

    for note in adapter_notes(config) if is_first_process() else []:
        print(f"note: {note}", file=sys.stderr)
    try:
        return check_run(cases, config)
    except FileNotFoundError:
        raise
    except OSError as error:  # the cases may be prepared where the model is not at hand
        return Checked([], [*check_memory(config), f"sizes and prompts are not checked against the model: {in_one_line(error)}"])


def choose_memory(config: Config, cases: list[Case], state: "PartialState") -> Config:
    """The config with the preset that fits the free memory; says which, and why."""
    from mosaic.planning.memory_choice import auto_config
    from mosaic.weights.hub import resolve_lora_file

    settings = config.inference
    if settings.lora is not None and not Path(settings.lora).exists():  # where the model alone does not fit, nothing is downloaded
        auto_config(config, cases, None, state)
    lora_file = resolve_lora_file(settings.lora, settings.lora_weight_name) if settings.lora else None
    config, reason = auto_config(config, cases, lora_file, state)
    if state.is_main_process:
        print(reason, file=sys.stderr)
    return config


def report(result: "RunResult", folder: str) -> None:
    """Say what there is, and every problem."""
    before = f" ({result.num_finished_before} were finished before)" if result.num_finished_before else ""
    print(f"{result.num_pictures} pictures in {folder}{before}")
    show_problems(result.problems)


def show_problems(problems: Iterable[Exception | str]) -> None:
    """One line for each, whatever line breaks a file name may hold."""
    for problem in problems:
        print(f"error: {printable(in_one_line(problem))}", file=sys.stderr)


@command("the same command goes on with the pictures that are missing")
def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 1 if some of the cases failed, 2 if nothing could begin."""
    arguments = parse_arguments(argv)
    first = is_first_process()
    bad: list[Exception] = []
    try:
        defaults = [] if arguments.config else pocket_inputs()
        config = load_config(arguments.config or DEFAULT_CONFIG, defaults + overrides(arguments))
        file = read_cases(config.inference.cases, config.data.reference_size, config.inference.reference_scale)
        notes, bad = list(file.notes), list(file.problems)
        if config.inference.report and config.inference.lora is None:
            notes.append("inference.report: has no effect without a reference LoRA, since the bare model sees no references.")
        for note in notes if first else []:
            print(f"note: {note}", file=sys.stderr)
        if arguments.check or not file.cases:
            unfit, more = check(config, file.cases) if arguments.check else ([], [])
            for note in more if first else []:
                print(f"note: {note}", file=sys.stderr)
            if first:
                print(f"{len(file.cases) - len(unfit)} good cases in {config.inference.cases}")
                show_problems([*bad, *unfit])
            return 1 if bad or unfit else 0
        if bad and first:
            print(f"{len(bad)} bad cases, listed at the end, are left out; the first: {bad[0]}", file=sys.stderr)
        result = run(config, file)
    except (ValueError, OSError) as error:
        if first:
            show_problems(bad)
        elif is_meant(error):  # the first process says it
            return USERS_ERROR
        raise
    if not first:  # the first process speaks, and decides, for all
        return 0
    result = result._replace(problems=[*map(str, bad), *result.problems])
    report(result, config.inference.output_dir)
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
