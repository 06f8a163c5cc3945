"""Everything that can be known of a training run before it begins: tokens, FLOPs, memory by part, time, disk, and what is missing."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch

from mosaic.config.loading import Config, config_to_json, resolved_dict
from mosaic.model.costs import Workload, captured_row_flops, lora_parameter_count, training_step_flops
from mosaic.planning.cards import Card, cards_of_size
from mosaic.planning.data_checks import DataFacts
from mosaic.planning.findings import NOTE, OK, STOP, Finding
from mosaic.planning.memory_model import GIB, predict_memory, step_tokens
from mosaic.planning.model_shape import ModelShape, read_model_shape
from mosaic.planning.preflight_checks import look_around
from mosaic.training.distributed.environment import read_distribution
from mosaic.training.watch.throughput import known_peak

ASSUMED_PEAK_TFLOPS = 989.0  # of a card of a size that no known one has: H100 and H200, dense bf16, data sheet
CPU_CORE_TFLOPS = 0.05  # one core with 256-bit vectors, float32; an assumption
EFFICIENCY = 0.40  # share of the peak at which a step runs, recomputation counted as work; an assumption
LEAST_EFFICIENCY, MOST_EFFICIENCY = 0.25, 0.50  # between which it is expected to lie; assumptions
FITS_BELOW = 0.95  # share of a card's memory that may be planned: allocators lose the rest to fragmentation


@dataclass(frozen=True)
class Device:
    """The device of one training process.

    Attributes:
        type: "cuda" or "cpu".
        name: For messages.
        memory: Bytes; None: not known.
        count: Processes of the run.
        peak_tflops: Of one process; where several cards are meant that of the fastest.
        slowest_tflops: Of the slowest of them; None: only one is meant.
        cards: Names of the cards that are meant where only a size is known.
    """

    type: str
    name: str
    memory: int | None
    count: int
    peak_tflops: float
    slowest_tflops: float | None = None
    cards: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preflight:
    """The report.

    Attributes:
        config: Resolved settings.
        counts: Parameters and tokens by name.
        tflop_per_step: TFLOP of one optimizer step of one process, recomputation included.
        model_tflop_per_step: Without recomputation; what a utilisation is measured by.
        memory: Bytes by part, of one process.
        device: What it would run on.
        hours_per_1k_steps: At `EFFICIENCY`.
        findings: What was looked at.
    """

    config: Config
    counts: dict[str, int]
    tflop_per_step: float
    model_tflop_per_step: float
    memory: dict[str, int]
    device: Device
    hours_per_1k_steps: float
    findings: list[Finding]

    @property
    def hours_range(self) -> tuple[float, float]:
        """For 1,000 steps: of the fastest card at `MOST_EFFICIENCY`, of the slowest at `LEAST_EFFICIENCY`."""
        slowest = self.device.slowest_tflops or self.device.peak_tflops
        fast, slow = MOST_EFFICIENCY * self.device.peak_tflops, LEAST_EFFICIENCY * slowest
        return 1000 * self.tflop_per_step / fast / 3600, 1000 * self.tflop_per_step / slow / 3600

    @property
    def ready(self) -> bool:
        """Whether nothing was found that would stop training."""
        return all(finding.level != STOP for finding in self.findings)


def preflight(
    config: Config,
    environ: Mapping[str, str] = MappingProxyType({}),
    resume: str | None = None,
    gpu_memory: float | None = None,
    num_references: int | None = None,
    card: Card | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> Preflight:
    """Look over a run; loads no weights, downloads nothing, writes nothing.

    Args:
        config: The run's settings.
        environ: Variables of one of the run's processes, which say how many there are and what is shared out over them; none: one process.
        resume: A checkpoint folder, or "auto" for the newest sound one of the run; None: a fresh start.
        gpu_memory: GiB of the card to plan for; None: the card that is there.
        num_references: K to plan for; None: the largest in the data, or `data.max_references` where the data cannot be read.
        card: The kind of card to plan for; `gpu_memory` goes before its memory.
        say: Called with what is done next, some of which takes a minute.

    Raises:
        FileNotFoundError, ValueError: If the base model's folder is damaged, or sizes do not fit its tokens.
    """
    shape, distribution = read_model_shape(config.model.pretrained), read_distribution(environ)
    say("looking at model, data, packages and disk")
    found = look_around(config, shape, environ, resume)
    references = num_references or found.facts.max_references
    device = find_device(config, gpu_memory, distribution.processes, card)
    say("predicting the memory by a dry run of the model, without its weights")
    memory = predict_memory(config, shape, references, device.type, distribution)
    whole, useful = (step_tflop(config, shape, references, mode) for mode in (config.model.gradient_checkpointing, "none"))
    hours = 1000 * whole / (EFFICIENCY * device.peak_tflops) / 3600
    findings = [*found.findings, *check_device(config, device, sum(memory.values()))]
    return Preflight(config, count(config, shape, references, found.facts), whole, useful, memory, device, hours, findings)


def count(config: Config, shape: ModelShape, num_references: int, facts: DataFacts) -> dict[str, int]:
    """Parameters and tokens."""
    text, target, references = step_tokens(config, shape, num_references)
    counts = {
        "frozen parameters": shape.base_parameters,
        "adapter parameters": lora_parameter_count(shape.transformer, config.lora.rank),
        "references": num_references,
        "text tokens": text,
        "target tokens": target,
        "reference tokens": references,
        "tokens per sample": text + target + references,
        "samples per step and process": config.training.batch_size * config.training.gradient_accumulation_steps,
    }
    return counts | ({} if facts.num_samples is None else {"samples": facts.num_samples})


def step_tflop(config: Config, shape: ModelShape, num_references: int, gradient_checkpointing: str) -> float:
    """TFLOP of one optimizer step of one process, captured rows included."""
    text, target, references = step_tokens(config, shape, num_references)
    blocks, per_reference, mode = shape.transformer, references // num_references, config.model.reference_attention
    load = Workload(config.training.batch_size, num_references, target, per_reference, text, config.lora.rank, mode)
    step = training_step_flops(blocks, load, gradient_checkpointing)
    captured = {"all": blocks["num_layers"] + blocks["num_single_layers"], "double": blocks["num_layers"]}
    setting_ = config.loss.capture_blocks
    num_captured = captured[setting_] if isinstance(setting_, str) else len(setting_)
    points = min(config.loss.max_points, references)
    means = config.loss.disentanglement_rows == "all" or config.loss.region_weight > 0
    keys = 0
    if config.loss.supervises_target:
        keys = load.all_reference_tokens if config.loss.target_keys == "references" else load.main_tokens + load.all_reference_tokens
    if config.loss.heads == "each":
        keys += target
    rows = captured_row_flops(blocks, load, points, num_captured, means, points * keys)
    return config.training.gradient_accumulation_steps * (step + rows) / 1e12


def find_device(config: Config, gpu_memory: float | None, processes: int = 1, card: Card | None = None) -> Device:
    """The device that each of so many processes would take, or the card that is planned for."""
    peak = config.training.peak_tflops
    if card is not None:
        return Device("cuda", card.name, int((gpu_memory or card.memory) * GIB), processes, peak or card.peak_tflops)
    if gpu_memory is not None:
        return _of_size(f"a card of {gpu_memory:g} GiB", int(gpu_memory * GIB), processes, peak)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        peak = peak or known_peak(torch.device("cuda", 0))
        return _of_size(properties.name, properties.total_memory, processes, peak)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    return Device("cpu", f"{os.cpu_count()} CPU cores", pages, processes, peak or CPU_CORE_TFLOPS * (os.cpu_count() or 1) / processes)


def _of_size(name: str, memory: int, processes: int, peak: float | None) -> Device:
    """A card of a size; where its speed is not known, that of the known ones of about this size."""
    if peak is not None:
        return Device("cuda", name, memory, processes, peak)
    cards = cards_of_size(memory / GIB)
    if not cards:
        return Device("cuda", name, memory, processes, ASSUMED_PEAK_TFLOPS)
    names = tuple(card.name for card in cards)
    return Device("cuda", name, memory, processes, cards[-1].peak_tflops, cards[0].peak_tflops, names)


def check_device(config: Config, device: Device, needed: int) -> list[Finding]:
    """Whether the prediction fits. A machine without a card may be the place to plan on, not the one to train on."""
    subject, given = "memory", f"{needed / GIB:.1f} GiB predicted"
    if device.type == "cpu" and device.count > 1:  # which share it
        given = f"{device.count} processes x {given}"
        needed *= device.count
    if device.memory is None:
        return [Finding(NOTE, subject, f"{given}; how much {device.name} have is not known.")]
    fits = needed <= FITS_BELOW * device.memory
    message = f"{given}, {device.memory / GIB:.1f} GiB on {device.name}."
    if fits:
        findings = [Finding(OK, subject, message)]
    elif device.type == "cpu":
        findings = [Finding(NOTE, subject, f"{message} No GPU is here; plan for a card with --gpu NAME or --gpu-memory GIB.")]
    else:
        findings = [Finding(STOP, subject, f"{message} {CURES}")]
    if (
        device.type == "cuda"
        and torch.cuda.is_available()
        and config.training.mixed_precision == "bf16"
        and not torch.cuda.is_bf16_supported()
    ):
        findings.append(
            Finding(STOP, "training.mixed_precision", f'"bf16" is not supported by {device.name}; set training.mixed_precision=no.')
        )
    return findings


CURES = (
    "Less memory, in this order: model.gradient_checkpointing=block, data.text_cache and data.latent_cache with validation.every=null (no "
    "encoders), "
    "model.quantization=nf4, a smaller lora.rank, optimizer.name=adamw_8bit, smaller sizes; `python scripts/preflight.py --table` compares."
)


def as_text(report: Preflight) -> str:
    """The report to read: the verdict first, then what it rests on, then the numbers; the resolved config last."""
    device, stops = report.device, [finding for finding in report.findings if finding.level == STOP]
    rest = [finding for finding in report.findings if finding.level != STOP]
    lines = [
        "ready" if report.ready else f"NOT READY: {len(stops)} finding{'s' if len(stops) > 1 else ''} would stop training",
        *(f"{finding.level:5s} {finding.subject}: {finding.message}" for finding in [*stops, *rest]),
        "",
        *(f"{name:30s} {value:>18,}" for name, value in report.counts.items()),
        f"{'TFLOP per step and process':30s} {report.tflop_per_step:>18,.4g}  ({report.model_tflop_per_step:,.4g} without recomputation)",
        "",
        f"predicted memory of one process on {device.name}, GiB",
        *(f"  {name:28s} {size / GIB:>18.3f}" for name, size in report.memory.items() if size),
        f"  {'total':28s} {sum(report.memory.values()) / GIB:>18.3f}",
        "",
        _time(report),
        "",
        "resolved config",
        config_to_json(report.config).rstrip(),
    ]
    return "\n".join(lines)


def _time(report: Preflight) -> str:
    """The line on time; a range, since neither the share of the peak nor, often, the card is known."""
    device, (fast, slow) = report.device, report.hours_range
    peak, cure = f"{device.peak_tflops:,.4g} TFLOP/s", ""
    if device.slowest_tflops not in (None, device.peak_tflops):
        peak = f"{device.slowest_tflops:,.4g} to {peak} ({', '.join(device.cards)})"
        cure = "; --gpu NAME says which"
    share = f"{LEAST_EFFICIENCY:.0%} to {MOST_EFFICIENCY:.0%}"
    return f"time for 1,000 steps: {_duration(fast)} to {_duration(slow)}, at {share} (assumed) of {peak}{cure}"


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"


def as_dict(report: Preflight) -> dict[str, Any]:
    """The report as JSON types."""
    return {
        "config": resolved_dict(report.config),
        "counts": report.counts,
        "tflop_per_step": report.tflop_per_step,
        "model_tflop_per_step": report.model_tflop_per_step,
        "memory_bytes": report.memory,
        "device": asdict(report.device),
        "hours_per_1k_steps": report.hours_per_1k_steps,
        "efficiency": EFFICIENCY,
        "hours_range_per_1k_steps": list(report.hours_range),
        "findings": [finding._asdict() for finding in report.findings],
        "ready": report.ready,
    }
