"""What the long pocket trainings share: schedule, moving average, several processes, checkpoints, logs."""

import datetime
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mosaic.files import replacing, write_text


@dataclass
class Clock:
    """Progress of a run in [0, 1], by steps or by minutes, counted over all its restarts.

    Args:
        steps: length of the run in optimiser steps, or None.
        minutes: length of the run in minutes of running time, or None.
        step: steps done.
        seconds: running time of earlier starts.
    """

    steps: int | None
    minutes: float | None
    step: int = 0
    seconds: float = 0.0
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Exactly one length must be given: with both, it would be unclear which one the decay follows."""
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"give either --steps or --max-minutes, got {self.steps} and {self.minutes}.")

    def elapsed(self) -> float:
        """Running time in seconds."""
        return self.seconds + time.monotonic() - self._started

    def progress(self) -> float:
        """Share of the run that is done."""
        if self.steps is not None:
            return min(1.0, self.step / max(1, self.steps))
        assert self.minutes is not None, "a run is as long as its steps or its minutes say"
        return min(1.0, self.elapsed() / (60.0 * self.minutes))

    def remaining(self) -> float:
        """Estimated seconds to the end."""
        done = self.progress()
        return self.elapsed() * (1.0 - done) / done if done > 0 else float("nan")


def learning_rate(step: int, progress: float, warmup: int, decay_from: float) -> float:
    """Factor of the peak learning rate: linear warm-up, constant, then half a cosine from `decay_from` down to 1 %."""
    warm = min(1.0, (step + 1) / max(1, warmup))
    late = max(0.0, (progress - decay_from) / max(1e-9, 1.0 - decay_from))
    return warm * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * late)))


class MovingAverage:
    """Exponential moving average of named parameters, in float32.

    The decay grows from 0 as (1 + n) / (10 + n), so that the average forgets the initial weights early on.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.count = 0
        self.values = {name: tensor.detach().clone() for name, tensor in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Moves the average towards the present values."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        present = [parameters[name].detach() for name in self.values]
        torch._foreach_lerp_(list(self.values.values()), present, 1.0 - decay)

    @contextmanager
    def applied(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Puts the averaged values into the parameters, and the present ones back at the end."""
        before = {name: parameters[name].detach().clone() for name in self.values}
        with torch.no_grad():
            for name, value in self.values.items():
                parameters[name].copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    parameters[name].copy_(value)


def named_parameters(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """All parameters of several modules, named `<module>.<parameter>`."""
    return {f"{key}.{name}": parameter for key, module in modules.items() for name, parameter in module.named_parameters()}


def save_checkpoint(
    file: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    average: MovingAverage,
    clock: Clock,
) -> None:
    """Writes everything that a resumed run needs."""
    state = {
        "modules": {key: module.state_dict() for key, module in modules.items()},
        "optimizer": optimizer.state_dict(),
        "average": average.values,
        "average_count": average.count,
        "step": clock.step,
        "seconds": clock.elapsed(),
    }
    with replacing(file) as aside:
        torch.save(state, aside)


def load_checkpoint(
    file: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    average: MovingAverage,
    clock: Clock,
) -> bool:
    """Restores the state that `save_checkpoint` wrote. Returns False where there is none yet."""
    if not file.exists():
        return False
    state = torch.load(file, map_location="cpu", weights_only=True)
    for key, module in modules.items():
        module.load_state_dict(state["modules"][key])
    optimizer.load_state_dict(state["optimizer"])
    for name, value in state["average"].items():
        average.values[name].copy_(value)
    average.count = state["average_count"]
    clock.step, clock.seconds = state["step"], state["seconds"]
    clock._started = time.monotonic()
    return True


def join_processes() -> None:
    """Connects the processes that torchrun started; does nothing for one that was started by itself."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(hours=2))


def processes() -> tuple[int, int]:
    """(number of this process, number of processes) of a run."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@torch.no_grad()
def average_gradients(parameters: dict[str, Tensor], loss: float, progress: float) -> tuple[float, float]:
    """Averages the gradients over the processes, in place; all get the mean loss and the first one's progress."""
    rank, world = processes()
    if world == 1:
        return loss, progress
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    numbers = torch.tensor([loss, progress * world * (rank == 0)], device=gradients[0].device)
    flat = torch.cat([numbers, *(g.flatten() for g in gradients)])
    dist.all_reduce(flat)
    flat /= world
    parts = flat[2:].split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
    return flat[0].item(), flat[1].item()


def check_begun(file: Path, settings: Mapping[str, Any], folder: str) -> None:
    """Keep the flags that a folder was begun with, and refuse others later.

    Args:
        file: Where they are kept.
        settings: By name of the flag, as JSON has them.
        folder: What --output says, for the message.

    Raises:
        ValueError: The folder was begun with others.
    """
    if not file.exists():
        write_text(file, json.dumps(dict(settings), indent=2) + "\n")
    elif (begun := json.loads(file.read_text())) != settings:
        differing = ", ".join(f"--{name.replace('_', '-')} {begun.get(name)}" for name in settings if begun.get(name) != settings[name])
        raise ValueError(f"--output: {folder} was begun with {differing}. Give the same flags, or another folder.")


def append_log(file: Path, **entry: float | int | str) -> None:
    """Adds one JSON line to a log file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(json.dumps(entry) + "\n")
