"""A LoRA file at a lower rank, module by module, with a report of what that costs."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mosaic.lora.files import LoraFile
from mosaic.lora.formats import read_module
from mosaic.lora.keys import find_modules
from mosaic.lora.resize import ReducedModule, rank_for_energy, reduce_module, singular_values
from mosaic.lora.scales import peft_config

REPORT_KEY = "mosaic_reduction"  # of the file's metadata


def find_rank(file: LoraFile, energy: float, on_module: Callable[[], object] = lambda: None) -> int:
    """The lowest rank, one for all modules, that keeps a share of the squared Frobenius norm of all s B A.

    Args:
        file: In any key style.
        energy: The share.
        on_module: Called after each module.

    Raises:
        ValueError: If the share is not more than 0 and at most 1, or the file cannot be read.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"the energy must be more than 0 and at most 1, got {energy:g}.")
    spectra, where = [], str(file.path)
    config = peft_config(file.metadata, where)
    for keys in find_modules(file, where).values():
        a, b, scale = read_module(file, keys, config, where)
        spectra.append(singular_values(a.double(), b.double() * scale))
        on_module()
    return rank_for_energy(spectra, energy)


def reduce_file(
    file: LoraFile, rank: int, on_module: Callable[[], object] = lambda: None
) -> tuple[dict[str, Tensor], dict[str, ReducedModule]]:
    """The tensors of a file at a lower rank, in the file's own key style and number formats; one module is held in float64 at a time.

    Args:
        file: In any key style.
        rank: The most rank that a module keeps; those that have no more stay as they are.
        on_module: Called after each module.

    Returns:
        The tensors by key (scale 1: alpha, where the file gives it, becomes the rank), and what each module lost.

    Raises:
        ValueError: If the rank is not positive, no module has a higher one, or the file cannot be read.
    """
    where = str(file.path)
    modules = find_modules(file, where)
    highest = max(max(file.shape(keys.down)[:1], default=0) for keys in modules.values())
    if not 1 <= rank < highest:
        raise ValueError(f"{where}: the rank must be at least 1 and less than the file's, {highest}, got {rank}. Nothing to reduce.")
    tensors: dict[str, Tensor] = {}
    reduced: dict[str, ReducedModule] = {}
    config = peft_config(file.metadata, where)
    for name, keys in modules.items():
        a, b, scale = read_module(file, keys, config, where)
        tensors[keys.down], tensors[keys.up], reduced[name] = reduce_module(a, b, scale, rank)
        if keys.alpha is not None:
            tensors[keys.alpha] = torch.tensor(float(len(tensors[keys.down])))
        on_module()
    return tensors, reduced


def overall(reduced: Mapping[str, ReducedModule]) -> tuple[float, float]:
    """The relative Frobenius error of all modules together, and the share of the squared singular values that is left."""
    whole = sum(module.norm**2 for module in reduced.values())
    if not whole:
        return 0.0, 1.0
    error = math.sqrt(sum(module.error**2 for module in reduced.values()) / whole)
    return error, sum(module.energy * module.norm**2 for module in reduced.values()) / whole


def reduction_report(reduced: Mapping[str, ReducedModule], source: str, source_digest: str) -> dict[str, Any]:
    """What each module lost, ready for JSON.

    Args:
        reduced: Of `reduce_file`.
        source: Name of the file before.
        source_digest: Its digest.
    """
    error, energy = overall(reduced)
    return {
        "source": {"name": source, "digest": source_digest},
        "relative_error": error,
        "kept": energy,
        "modules": {
            name: {
                "rank_before": module.rank_before,
                "rank": module.rank,
                "relative_error": module.relative_error,
                "kept": module.energy,
            }
            for name, module in reduced.items()
        },
    }
