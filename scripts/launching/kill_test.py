"""A training run that is killed again and again, resumed each time, and compared with one that ran through."""

import dataclasses
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from mosaic.config.loading import Config
from mosaic.training.checkpoints.checkpoint import checkpoint_folders, folder_of

POLL_SECONDS = 0.0005


@dataclasses.dataclass
class Report:
    """What happened.

    Attributes:
        wanted: Kills asked for.
        moments: Kills by what the run was doing.
        differences: What differs from the uninterrupted run, in words.
        seconds: Time it all took.
    """

    wanted: int
    moments: Counter[str]
    differences: list[str]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether all kills took place and nothing differs."""
        return sum(self.moments.values()) == self.wanted and not self.differences

    def lines(self) -> list[str]:
        """The report for a terminal."""
        counts = ", ".join(f"{count} {moment}" for moment, count in sorted(self.moments.items()))
        equal = "equal bit for bit: weights, optimizer, average, log"
        result = f"DIFFERENT: {'; '.join(self.differences)}" if self.differences else equal
        return [f"{sum(self.moments.values())} of {self.wanted} kills ({counts}) in {self.seconds:.0f} s", result]


def kill_test(config: Config, output: Path, kills: int, rng: random.Random) -> Report:
    """Run twice, once with kills, and compare.

    Args:
        config: Of the run; `training.output_dir` and `training.log_every` are replaced.
        output: Gets the folders `whole` and `killed`.
        kills: Number of kills; spread over `training.max_steps`.
        rng: Draws the moments.

    Raises:
        ValueError: A run ended by itself with an error; its output is in `output/*.log`.
    """
    start = time.monotonic()
    preload()
    whole, killed = (_with_output(config, output / name) for name in ("whole", "killed"))
    _wait(start_run(whole), whole)
    assert config.training.max_steps is not None, "a run that ends by epochs is refused before"
    advance = config.training.max_steps / (kills + 1)
    moments: Counter[str] = Counter()
    with tqdm(total=kills, desc="kills", unit="kill") as progress:
        while sum(moments.values()) < kills:
            moment = start_and_kill(killed, rng, advance)
            if moment is None:  # it had reached its end
                break
            moments[moment] += 1
            progress.update()
    _wait(start_run(killed), killed)
    return Report(kills, moments, compare(output / "whole", output / "killed"), time.monotonic() - start)


def _with_output(config: Config, folder: Path) -> Config:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return config.replace(training=config.training.replace(output_dir=str(folder), log_every=1))


def preload() -> None:
    """Import what a run needs, once for all: runs are forks of this process, which computes nothing itself."""
    torch.set_num_threads(1)  # a fork cannot use its parent's threads
    import tensorboard  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import mosaic.training  # noqa: F401


def start_run(config: Config) -> int:
    """Fork a process that trains, resuming where it can; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(f"{config.training.output_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from mosaic.training import train

        train(config, resume="auto")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, config: Config) -> None:
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise ValueError(f"the run in {config.training.output_dir} failed; see {config.training.output_dir}.log.")


def start_and_kill(config: Config, rng: random.Random, advance: float) -> str | None:
    """Start a run and kill it at a random moment; returns what it was doing, or None if it ended by itself before.

    Args:
        config: Of the run.
        rng: Draws the moment.
        advance: Mean number of steps that it gets.

    Raises:
        ValueError: It ended by itself with an error.
    """
    run = Path(config.training.output_dir)
    kind = rng.choices(("start", "step", "write"), (1, 6, 3))[0]
    begun, old_log = _newest(run), _log_file(run)
    goal = begun + 1 + int(rng.random() * 2 * max(advance - 1, 0) + 0.5)
    child = start_run(config)
    step, seen, last, step_time = 0, 0, time.monotonic(), 0.05
    deadline = time.monotonic() + rng.uniform(0, 1.5) if kind == "start" else None
    while deadline is None or time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if status != 0:
                raise ValueError(f"the run in {run} failed; see {run}.log.")
            return None
        step = _logged(run) if _log_file(run) != old_log else 0  # the old log holds steps that will be done again
        if step > seen:
            step_time, last, seen = time.monotonic() - last, time.monotonic(), step
        if deadline is None and step >= goal:
            if kind == "step":
                deadline = time.monotonic() + rng.random() * min(step_time, 1.0)
            elif _writing(run):
                deadline = time.monotonic() + rng.random() * 0.02
        time.sleep(POLL_SECONDS)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if step == 0:
        return "at the start"
    return "while writing a checkpoint" if _writing(run) else "in training"


def _log_file(run: Path) -> int | None:
    """Which file the log is: a run that starts writes it anew."""
    file = run / "metrics.jsonl"
    return file.stat().st_ino if file.is_file() else None


def _newest(run: Path) -> int:
    """Step of the newest checkpoint."""
    found = checkpoint_folders(run / "checkpoints")
    return int(found[-1].name.removeprefix("step_")) if found else 0


def _logged(run: Path) -> int:
    """Number of the last step in the log, from the number of its complete lines: every step is logged."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b'"loss/total"') if file.is_file() else 0


def _writing(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step_*"))


def compare(whole: Path, killed: Path) -> list[str]:
    """What differs between two finished runs, in words."""
    differences = []
    last = checkpoint_folders(whole / "checkpoints")[-1]
    other = folder_of(killed / "checkpoints", int(last.name.removeprefix("step_")))
    for name in sorted(path.name for path in last.glob("*.safetensors")):
        differences += _compare_tensors(last / name, other / name, f"checkpoint {name}")
    differences += _compare_tensors(whole / "lora.safetensors", killed / "lora.safetensors", "lora.safetensors")
    if (whole / "metrics.jsonl").read_text() != (killed / "metrics.jsonl").read_text():
        differences.append("metrics.jsonl")
    left = [path.name for path in (killed / "checkpoints").glob(".*")]
    return differences + ([f"left over: {', '.join(left)}"] if left else [])


def _compare_tensors(first: Path, second: Path, name: str) -> list[str]:
    if not second.is_file():
        return [f"{name} is missing"]
    a, b = load_file(first), load_file(second)
    if a.keys() != b.keys():
        return [f"{name} has other tensors"]
    count = sum(not torch.equal(a[key], b[key]) for key in a)
    return [f"{name}: {count} of {len(a)} tensors"] if count else []
