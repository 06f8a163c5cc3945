"""How fast a run is: samples, tokens and FLOPs per second, the share of the peak, memory, and the share of time spent waiting for data."""

import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch

from mosaic.config.loading import Config
from mosaic.data import MosaicBatch
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.training.encoding import batch_grids

Step = TypeVar("Step")

# Dense bf16 products with float32 sums, in TFLOP/s, from the makers' data sheets; the first pattern found in the device's name counts.
PEAK_TFLOPS: dict[str, float] = {
    r"H100 PCIe": 756,
    r"H100 NVL": 835,
    r"\bG?H[12]00\b": 989,
    r"\bB200\b": 2250,
    r"\bA100\b": 312,
    r"\bL40S\b": 362,
    r"\bL4$": 121,
    r"RTX 6000 Ada": 364,
    r"RTX A6000$": 155,
    r"RTX 5090$": 210,
    r"RTX 4090$": 165,
    r"RTX 3090$": 71,
}


def known_peak(device: torch.device) -> float | None:
    """TFLOP/s of a GPU's data sheet; None where it is not known, and on a CPU."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """TFLOP/s of a card's data sheet by its name; None where it is not known."""
    return next((peak for pattern, peak in PEAK_TFLOPS.items() if re.search(pattern, name)), None)


class Work(NamedTuple):
    """What a process has worked on.

    Attributes:
        samples: Number of samples.
        tokens: Text, target and reference tokens of their joint sequences.
        flops: FLOPs of the transformer's forward and backward pass, without what gradient checkpointing computes a second time.
    """

    samples: int
    tokens: int
    flops: float


def batch_work(batch: MosaicBatch, pipeline: MosaicFluxPipeline, config: Config) -> Work:
    """The work of one micro-batch, by `mosaic.model.costs`; encoders, losses and the optimizer are not counted."""
    from mosaic.model.costs import Workload, training_step_flops

    grids = batch_grids(batch, pipeline.encoders.vae_scale_factor)
    load = Workload(
        batch_size=len(batch.prompts),
        num_references=batch.num_references,
        target_tokens=grids.target.num_tokens,
        reference_tokens=grids.reference.num_tokens,
        text_tokens=config.model.text_length,
        lora_rank=config.lora.rank,
        reference_attention=config.model.reference_attention,
    )
    flops = training_step_flops(pipeline.transformer.config, load, gradient_checkpointing="none")
    return Work(load.batch_size, load.num_tokens, flops)


class ThroughputMeter:
    """Times the steps of an interval; what happens between them (log, checkpoint, validation) does not count."""

    def __init__(
        self,
        num_processes: int,
        device: torch.device,
        peak_tflops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start an interval.

        Args:
            num_processes: Processes that do the same work as this one, this one included.
            device: Whose memory is reported.
            peak_tflops: Peak of one device, for the utilisation; None: `known_peak`.
            clock: Seconds from an arbitrary start.
        """
        self.num_processes, self.device, self.clock = num_processes, device, clock
        self.peak_tflops = peak_tflops if peak_tflops is not None else known_peak(device)
        self._begin()

    def _begin(self) -> None:
        self.steps, self.waiting, self.working = 0, 0.0, 0.0
        self.work = Work(0, 0, 0.0)
        self.started: float | None = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def wait_for(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Hand on what an iterator gives and time how long each takes to come; the step lasts until `end_step`."""
        iterator = iter(steps)
        while True:
            begin = self.clock()
            try:
                step = next(iterator)
            except StopIteration:
                return
            self.started = self.clock()
            self.waiting += self.started - begin
            yield step

    def end_step(self, work: Iterable[Work]) -> None:
        """The step that `wait_for` has begun is over.

        Args:
            work: That of each of its micro-batches on this process.
        """
        assert self.started is not None
        self.working += self.clock() - self.started
        self.steps += 1
        self.work = Work(*(sum(parts) for parts in zip(self.work, *work, strict=True)))

    def report(self) -> dict[str, float]:
        """The figures of the interval by the names they are logged under; then begins another.

        Returns:
            throughput/samples_per_second and throughput/tokens_per_second of all processes; throughput/tflops (10^12 FLOP/s of one
            device); throughput/mfu, its share of the peak, where that is known; throughput/step_seconds, with the wait;
            throughput/data_wait_share; memory/allocated_peak_gib of the interval on a GPU, else memory/resident_peak_gib since the
            start. Nothing where no step has ended.
        """
        if not self.steps:
            return {}
        seconds = max(self.waiting + self.working, 1e-9)
        tflops = self.work.flops / seconds / 1e12
        values = {
            "throughput/samples_per_second": self.num_processes * self.work.samples / seconds,
            "throughput/tokens_per_second": self.num_processes * self.work.tokens / seconds,
            "throughput/tflops": tflops,
            "throughput/step_seconds": seconds / self.steps,
            "throughput/data_wait_share": self.waiting / seconds,
        }
        if self.peak_tflops is not None:
            values["throughput/mfu"] = tflops / self.peak_tflops
        if self.device.type == "cuda":
            values["memory/allocated_peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        else:
            values["memory/resident_peak_gib"] = resident_peak_bytes() / 2**30
        self._begin()
        return values


def resident_peak_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
