"""Two checkouts in one run: the command `against` of scripts/benchmark.py.

Each measurement is a process of its own in either checkout, with that one's `mosaic` and the files of this room, which use only what both
have. The two processes take turns step by step, one after the other and each first in every other round, so that whatever else this machine
does meets both. Times are CPU seconds of one thread. The numbers that come out of the steps are compared as well.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from mosaic.files import write_text
from scripts.benchmarks import ROOT

WARM_UP_STEPS = 2
SIDES = ("old", "new")
OUTPUTS = 64  # numbers of a velocity that are compared


class Task(NamedTuple):
    """What is measured.

    Attributes:
        model: Of `scripts.benchmarks.models.MODELS`.
        kind: "train": a step of training with the paper's losses; "target": of sampling; "cached": of sampling with kept references.
        references: K.
    """

    model: str
    kind: str
    references: int

    def __str__(self) -> str:
        return f"{self.model} {self.kind} {self.references}"


TASKS = (
    *(Task("mid", "train", k) for k in (1, 4, 6)),
    *(Task("mid", kind, 4) for kind in ("target", "cached")),
    *(Task("thin", kind, 4) for kind in ("train", "target", "cached")),
)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, return the result. What the output file has of the same two checkouts is not measured again.

    Raises:
        FileNotFoundError: The other checkout has no mosaic.
        ValueError: A task is unknown, or a measuring process has ended by itself.
    """
    trees = {"old": args.other.resolve(), "new": ROOT}
    if not (trees["old"] / "mosaic/__init__.py").is_file():
        raise FileNotFoundError(f"{args.other}: must be a checkout of this repository, but there is no mosaic/__init__.py.")
    tasks = [parse_task(text) for text in args.tasks] if args.tasks else TASKS
    settings = {"trees": {side: state_of(tree) for side, tree in trees.items()}, "rounds": args.rounds, "processes": args.processes}
    rows = finished(args.output, settings)
    result = {**settings, "date": time.strftime("%Y-%m-%d"), "clock": "cpu", "threads": 1, "rows": rows}
    with tempfile.TemporaryDirectory() as folder:
        views = {side: view_of(tree, Path(folder) / side) for side, tree in trees.items()}
        for task in tqdm(tasks, desc="tasks", unit="task"):
            if str(task) not in rows:
                rows[str(task)] = compared([measure(task, views, args.rounds) for _ in range(args.processes)])
                if args.output:
                    write_text(args.output, json.dumps(result, indent=2) + "\n")
    print_table(result)
    return result


def parse_task(text: str) -> Task:
    """A task as it is written: "mid train 4".

    Raises:
        ValueError: It is none.
    """
    words = text.split()
    if len(words) != 3 or words[1] not in STEPS or not words[2].isdecimal() or not int(words[2]):
        raise ValueError(f'--tasks must be like "mid train 4", MODEL and {" or ".join(STEPS)} and K, got "{text}"')
    return Task(words[0], words[1], int(words[2]))


def state_of(tree: Path) -> str:
    """The commit of a checkout, with a plus sign where files have been changed since."""
    git = ["git", "-C", str(tree)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip() or "unknown"
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no", "mosaic"], capture_output=True, text=True).stdout
    return f"{commit}+" if changed else commit


def finished(output: Path | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of an earlier run with the same settings and checkouts without changes, by task."""
    if output is None or not output.is_file() or any(state.endswith(("+", "unknown")) for state in settings["trees"].values()):
        return {}
    earlier = json.loads(output.read_text(encoding="utf-8"))
    return earlier["rows"] if {key: earlier.get(key) for key in settings} == dict(settings) else {}


def view_of(tree: Path, folder: Path) -> Path:
    """A folder in which Python finds that checkout's `mosaic`, and these benchmarks."""
    folder.mkdir()
    for name, source in (("mosaic", tree), ("scripts", ROOT), ("tests", ROOT)):
        (folder / name).symlink_to(source / name)
    return folder


def measure(task: Task, views: Mapping[str, Path], rounds: int) -> dict[str, dict[str, list[Any]]]:
    """Seconds, numbers and peak memory of every round, of both sides."""
    found: dict[str, dict[str, list[Any]]] = {side: {"seconds": [], "numbers": [], "peak_mib": []} for side in SIDES}
    with worker(task, views["old"]) as old, worker(task, views["new"]) as new:
        ask = {"old": old, "new": new}
        for turn in range(WARM_UP_STEPS + rounds):
            for side in SIDES if turn % 2 else SIDES[::-1]:
                answer = ask[side](turn)
                found[side]["numbers"].append(answer["numbers"])
                found[side]["peak_mib"].append(answer["peak_mib"])
                if turn >= WARM_UP_STEPS:
                    found[side]["seconds"].append(answer["seconds"])
    return found


@contextlib.contextmanager
def worker(task: Task, view: Path) -> Iterator[Callable[[int], dict[str, Any]]]:
    """A measuring process; what is given asks it for the step of a number.

    Raises:
        ValueError: It has ended by itself.
    """
    code = "from scripts.benchmarks import against; against.serve()"
    environ = {**os.environ, "PYTHONPATH": str(view), **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")}
    command = [sys.executable, "-c", code, task.model, task.kind, str(task.references)]
    with subprocess.Popen(command, cwd=view, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        asked, answered = process.stdin, process.stdout
        assert asked is not None  # both are pipes
        assert answered is not None

        def read() -> dict[str, Any]:
            for line in answered:
                if line.startswith("{"):
                    found: dict[str, Any] = json.loads(line)
                    return found
            raise ValueError(f"the measuring process of {task} has ended by itself in {view.name}; its message is above.")

        def ask(turn: int) -> dict[str, Any]:
            asked.write(f"{turn}\n")
            asked.flush()
            return read()

        try:
            used = Path(read()["mosaic"])
            assert used.is_relative_to((view / "mosaic").resolve()), used
            yield ask
        finally:
            process.kill()


def serve() -> None:
    """In a measuring process: one step for each line that comes in, and a line of JSON for each."""
    import torch

    import mosaic
    from scripts.benchmarks.measuring import forget_resident_peak, resident_mib

    task = Task(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    torch.set_num_threads(1)
    torch.set_flush_denormal(task.kind == "train")  # as that command has it, in both
    step = STEPS[task.kind](task)
    built = resident_mib("VmRSS")
    forget_resident_peak()
    print(json.dumps({"mosaic": str(Path(mosaic.__file__).resolve())}), flush=True)
    for line in sys.stdin:
        torch.manual_seed(int(line))
        start = time.process_time()
        numbers = step(int(line))
        seconds = time.process_time() - start
        print(json.dumps({"seconds": seconds, "numbers": numbers, "peak_mib": resident_mib("VmHWM") - built}), flush=True)


def training(task: Task) -> Callable[[int], list[float]]:
    """Steps of training; loss and norm of the gradient."""
    import torch

    from mosaic.lora.adapter import reference_lora_parameters
    from mosaic.planning.dry_run import StandInStep
    from scripts.benchmarks.measuring import optimizer_step
    from scripts.benchmarks.models import measured_model

    model = measured_model(task.model)
    config = model.config(task.references)
    transformer = model.build(config, "cpu")
    parameters = list(reference_lora_parameters(transformer).values())
    loss, optimizer = StandInStep(config, model.shape, task.references, transformer), torch.optim.AdamW(parameters, lr=1e-4)
    return lambda _: [float(number) for number in optimizer_step(loss, parameters, optimizer)]


def sampling(task: Task) -> Callable[[int], list[float]]:
    """Steps of sampling, "cached" with references that the first step keeps; numbers of the velocity."""
    import torch

    from mosaic.method.grids import token_grid
    from mosaic.method.tokens import position_ids, reference_position_ids, text_position_ids
    from mosaic.model.reference_cache import CachedTransformer
    from scripts.benchmarks.models import measured_model

    model, is_cached = measured_model(task.model), task.kind == "cached"
    config, shape = model.config(task.references), model.shape.transformer
    transformer = model.build(config, "cpu").requires_grad_(False).eval()
    target, reference = (token_grid(side, side, model.shape.vae_scale_factor, where="") for side in (model.size, model.reference_size))
    channels = shape["in_channels"]
    references = {
        "reference_hidden_states": torch.randn(1, task.references, reference.num_tokens, channels),
        "reference_ids": reference_position_ids(reference, task.references),
        "reference_attention": "isolated" if is_cached else "target",
    }
    inputs = {
        "encoder_hidden_states": torch.randn(1, model.text_tokens, shape["joint_attention_dim"]),
        "pooled_projections": torch.randn(1, shape["pooled_projection_dim"]),
        "img_ids": position_ids(target),
        "txt_ids": text_position_ids(model.text_tokens),
        "guidance": torch.ones(1) if shape["guidance_embeds"] else None,
    }
    sampler = CachedTransformer(transformer, references, float("inf") if is_cached else 1)

    def step(turn: int) -> list[float]:
        noisy = torch.randn(1, target.num_tokens, channels)
        with torch.inference_mode():
            velocity = sampler(turn, hidden_states=noisy, timestep=torch.full((1,), 1 / (1 + turn)), **inputs).sample
        return velocity.flatten()[:: max(velocity.numel() // OUTPUTS, 1)].tolist()

    return step


STEPS: Mapping[str, Callable[[Task], Callable[[int], list[float]]]] = {"train": training, "target": sampling, "cached": sampling}


def compared(processes: list[dict[str, dict[str, list[Any]]]]) -> dict[str, Any]:
    """Medians of both sides, of the ratios new / old within a round the median and the quartiles; peak memory; the numbers' difference."""
    ratios = [new / old for found in processes for old, new in zip(found["old"]["seconds"], found["new"]["seconds"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    pairs = [pair for found in processes for pair in zip(found["old"]["numbers"], found["new"]["numbers"], strict=True)]
    row: dict[str, Any] = {
        f"{side}_seconds": statistics.median(value for found in processes for value in found[side]["seconds"]) for side in SIDES
    }
    row |= {"ratio": statistics.median(ratios), "low": low, "high": high, "rounds": len(ratios)}
    row |= {f"{side}_peak_mib": max(max(found[side]["peak_mib"]) for found in processes) for side in SIDES}
    return row | {"difference": max(difference(old, new) for old, new in pairs), "ratios": ratios}


def difference(old: list[float], new: list[float]) -> float:
    """The largest difference of two steps' numbers, of the largest of them."""
    return max(abs(a - b) for a, b in zip(old, new, strict=True)) / max(max(map(abs, old)), 1e-30)


def print_table(result: Mapping[str, Any]) -> None:
    """The result as a Markdown table."""
    print(table(result))


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    trees = result["trees"]
    lines = [
        f"CPU seconds of a step, one thread, {trees['new']} over {trees['old']}: medians of {result['rounds']} rounds in turns in each "
        f"of {result['processes']} pairs of processes, in brackets the ratio's quartiles; memory above the built model ({result['date']}).",
        "",
        "| step | old s | new s | new / old | old MiB | new MiB | largest difference of the numbers |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["rows"].items():
        model, kind, references = name.split()
        lines.append(
            f"| {model}, {kind}, K = {references} | {row['old_seconds']:.3g} | {row['new_seconds']:.3g} "
            f"| {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}] | {row['old_peak_mib']:.0f} | {row['new_peak_mib']:.0f} "
            f"| {row['difference']:.0e} |"
        )
    return "\n".join(lines)
