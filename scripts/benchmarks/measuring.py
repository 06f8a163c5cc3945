"""Clocks, memory and the rate of a large matrix product: what every measurement of a step uses."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mosaic.planning.storage_meter import StorageMeter

WARM_UP_STEPS = 2
PRODUCT_SIDE = {"cuda": 8192, "cpu": 1024}  # of the matrices whose product gives the device's rate
CLOCKS = ("cpu", "wall")  # of a CPU


class StepClock:
    """Marks moments, and tells the seconds between them: by events of the device on a GPU, which then does not wait; else by a clock."""

    def __init__(self, device: str, clock: str = "cpu") -> None:
        """A first mark is set.

        Args:
            device: "cuda" or "cpu".
            clock: Of a CPU. "cpu": time that this process has really had, whoever else works here, of all its threads; "wall": what passes.
        """
        self._device = device
        self._now = time.process_time if clock == "cpu" else time.perf_counter
        self._marks: list[Any] = []
        self.mark()

    def mark(self, *_: Any) -> None:
        """Now."""
        if self._device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(self._now())

    def seconds(self) -> list[float]:
        """From each mark to the next."""
        if self._device != "cuda":
            return [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in zip(self._marks, self._marks[1:], strict=False)]


def timed(function: Callable[[], Any], device: str, clock: str = "cpu") -> float:
    """Seconds of a call, by `StepClock`."""
    clock_ = StepClock(device, clock)
    function()
    clock_.mark()
    return clock_.seconds()[0]


def peak_bytes(step: Callable[[], Any], tensors: Sequence[Tensor], device: str) -> int:
    """Most bytes of tensors alive in a step: CUDA's allocator says, on a CPU they are counted."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with StorageMeter() as meter:
        meter.mark("given", tensors)
        meter.reset_peak()
        step()
    return meter.peak.total()


def product_tflops(device: str, dtype: torch.dtype, clock: str = "cpu") -> float:
    """The rate of a large matrix product: best of ten."""
    side = PRODUCT_SIDE[device]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(timed(lambda: left @ right, device, clock) for _ in range(10)) / 1e12


def optimizer_step(loss: Callable[[], Tensor], parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor]:
    """Forward, backward, clipping, update: what a step of training does. Loss and norm of the gradient."""
    total = loss()
    total.backward()
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total.detach(), norm


def device_name(device: str, threads: int) -> str:
    """The card's name, or how many threads of a CPU."""
    return torch.cuda.get_device_name(0) if device == "cuda" else f"{threads} CPU thread{'' if threads == 1 else 's'}"


def resident_mib(field: str) -> float:
    """A field of /proc/self/status, such as VmRSS (now) or VmHWM (the peak), in MiB.

    Raises:
        RuntimeError: This system has no such file.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        raise RuntimeError("memory is read from /proc/self/status, which only Linux has.")
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def forget_resident_peak() -> None:
    """VmHWM starts again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
