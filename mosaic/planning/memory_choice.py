"""What `inference.memory` "auto" does: the free memory is read, and the first preset that is predicted to fit it is taken."""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open

from mosaic.config.loading import Config
from mosaic.planning.inference_memory import Demand, predict_inference
from mosaic.planning.memory_model import GIB
from mosaic.planning.model_shape import read_model_shape
from mosaic.planning.preflight import FITS_BELOW
from mosaic.rendering.cases.reading import Case
from mosaic.rendering.memory_presets import PRESETS, MemoryPreset, missing_packages, with_format
from mosaic.weights.hub import resolve_style_lora_file
from mosaic.weights.quantization import INSTALL

CGROUP = Path("/sys/fs/cgroup")


class Choice(NamedTuple):
    """What was chosen.

    Attributes:
        preset: Value of `inference.memory`.
        reason: One line: what it does, and why it was taken.
    """

    preset: str
    reason: str


def largest_demand(cases: Iterable[Case], config: Config) -> Demand:
    """The largest size, the most references and the guidance of a run's cases, whether or not one case has all, and the style LoRA."""
    settings, sizes, references, guided = config.inference, [], [0], False
    for case in cases:
        scale = case.options.image_guidance_scale
        guided |= len(case.references) > 0 and (settings.image_guidance_scale if scale is None else scale) != 1
        sizes.append((case.options.height or settings.height, case.options.width or settings.width))
        references.append(len(case.references))
    height, width = max(sizes, key=lambda size: size[0] * size[1], default=(settings.height, settings.width))
    return Demand(height, width, max(references), guided, style_parameters(config))


def style_parameters(config: Config) -> int:
    """Numbers of the style LoRA, from its header; 0 without one, or where it cannot be read (loading it will say why).

    Raises:
        FileNotFoundError, OSError: If there is no such file.
    """
    settings = config.inference
    if settings.style_lora is None:
        return 0
    path = resolve_style_lora_file(settings.style_lora, settings.style_lora_weight_name)
    try:
        with safe_open(path, framework="pt") as tensors:
            return sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118 (not a dict)
    except SafetensorError:
        return 0


def lora_rank(file: Path | None) -> int:
    """Rank of a reference LoRA file, from its header; 0 without one, or where it cannot be told (loading it will say why)."""
    if file is None:
        return 0
    try:
        with safe_open(file, framework="pt") as tensors:
            key = next((key for key in tensors.keys() if ".lora_A." in key or ".lora_down." in key), None)  # noqa: SIM118 (not a dict)
            return 0 if key is None else tensors.get_slice(key).get_shape()[0]
    except SafetensorError:
        return 0


def choose_preset(
    config: Config, demand: Demand, rank: int, device: torch.device, free: int, presets: Mapping[str, MemoryPreset] = PRESETS
) -> Choice:
    """The fastest preset whose prediction fits the free memory and whose packages are there.

    Args:
        config: The settings.
        demand: The most that a picture needs.
        rank: Of the reference LoRA; 0: there is none.
        device: Where pictures are rendered.
        free: Bytes.
        presets: Those that will do, from the fastest to the one that needs least.

    Raises:
        ValueError: If none fits.
    """
    cure = "Render"
    shape, skipped = read_model_shape(config.model.pretrained), []
    given = f"{demand.width} x {demand.height} px and {demand.num_references} references"
    for name, preset in presets.items():
        try:
            preset = with_format(preset, config)
        except ValueError:
            continue
        needed = predict_inference(config, shape, preset, demand, rank, device.type)
        if needed.peak > FITS_BELOW * free:
            skipped.append(f"{name} {_gib(needed.peak)}")
            continue
        if missing := missing_packages(preset):
            skipped.append(f"{name} needs {' and '.join(missing)}")
            cure = f"Install what is missing ({INSTALL}), render"
            continue
        why = f"{_gib(needed.peak)} predicted at {given}, {_gib(free)} free"
        return Choice(name, f"memory auto: {name} ({preset.describe()}): {why}" + (f"; not {', '.join(skipped)}" if skipped else ""))
    raise ValueError(
        f'inference.memory "auto": none of the presets fits {_gib(free)} of free memory at {given} ({", ".join(skipped)}). {cure} smaller '
        "pictures or fewer references, free memory, or name a preset to try it all the same."
    )


def auto_config(config: Config, cases: Iterable[Case], lora_file: Path | None, state: PartialState) -> tuple[Config, str]:
    """The config with a preset in the place of "auto", the same in all processes, and the line that says why.

    Args:
        config: The settings.
        cases: All that will be rendered.
        lora_file: The reference LoRA; None: there is none.
        state: The processes; the one with the least free memory decides.

    Raises:
        ValueError: If none fits, or the free memory cannot be read.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    free = min(gather_object([free_memory(state.device, here)]))
    choice = choose_preset(config, largest_demand(cases, config), lora_rank(lora_file), state.device, free)
    return config.replace(inference=config.inference.replace(memory=choice.preset)), choice.reason


def free_memory(device: torch.device, num_processes: int = 1) -> int:
    """Bytes that are free: on a GPU its own; on a CPU this process's share of the machine's, or of its container's.

    Args:
        device: Where.
        num_processes: Processes that share the CPU's memory.

    Raises:
        ValueError: If this cannot be read.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _available_ram() if device.type == "cpu" else None
    if free is None:
        raise ValueError(f'inference.memory "auto" cannot read the free memory of {device.type} here; name one of {", ".join(PRESETS)}.')
    return free // num_processes


def _available_ram(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = CGROUP) -> int | None:
    """Bytes of memory that programs could still take, or None where Linux does not say."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = (cgroup / "memory.max").read_text(), int((cgroup / "memory.current").read_text())
        cached = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return free if limit.strip() == "max" else min(free, int(limit) - used + int(cached.get("inactive_file", 0)))
    except (OSError, ValueError):
        return free


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"
