"""The scale s of the modules of a LoRA file, whose weights change by s B A: from an alpha tensor, or from PEFT's config in the metadata.

s = alpha / r, or alpha / sqrt(r) where the config says `use_rslora`. A file that gives no alpha, as training here writes it, has s = 1.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from mosaic.lora.files import DIFFUSERS_METADATA, metadata_object

SCALES = (1e-6, 1e6)  # beyond them a file is damaged, and factors that take the scale up would overflow
PREFIX = "transformer."  # of the transformer's settings, where a file also has those of text encoders
#: Settings of PEFT under which an adapter is more than s B A on its module, and what they ask for.
MORE_THAN_LORA = {
    "use_dora": "DoRA, which rescales the base weights",
    "lora_bias": "biases beside the matrices",
    "modules_to_save": "whole modules in the place of the base's",
    "layer_replication": "layers that occur more than once",
    "alora_invocation_tokens": "an adapter that acts after certain tokens only",
    "use_qalora": "QALoRA, which pools the input",
    "use_bdlora": "block-diagonal matrices",
    "arrow_config": "Arrow, which chooses among adapters",
    "kasa_config": "KaSA, which changes the base weights",
    "monteclora_config": "MonteCLoRA, which draws weights at random",
}
CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights that take something off the base weights


class Alpha(NamedTuple):
    """The alpha that a file gives a module in a tensor.

    Attributes:
        key: Of the tensor.
        tensor: It.
    """

    key: str
    tensor: Tensor


def peft_config(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """PEFT's config of the transformer's adapter, as diffusers keeps it in a file's metadata; empty if there is none.

    Args:
        metadata: Of the file.
        where: The file, for messages.

    Raises:
        ValueError: If it is no JSON object, or asks for more than a plain LoRA.
    """
    declared = metadata_object(metadata, DIFFUSERS_METADATA, where)
    config = {key.removeprefix(PREFIX): value for key, value in declared.items() if key.startswith(PREFIX)}
    config = config or {key: value for key, value in declared.items() if "." not in key}
    asked = [f"{name} ({what})" for name, what in MORE_THAN_LORA.items() if config.get(name)]
    if str(config.get("peft_type", "LORA")).rpartition(".")[2] != "LORA":
        asked.append(f"peft_type {config['peft_type']!r:.100}")
    if config.get("bias", "none") != "none":
        asked.append(f"bias {config['bias']!r:.100} (trained biases of the base)")
    if str(config.get("init_lora_weights")).startswith(CHANGED_BASES):
        asked.append(f"init_lora_weights {config['init_lora_weights']!r:.100} (a base whose weights were changed)")
    if asked:
        raise ValueError(f"{where}: by its metadata it asks for {', '.join(asked)[:500]}. Only plain LoRA can be read.")
    return config


def module_scale(config: Mapping[str, Any], module: str, rank: int, alpha: Alpha | None, where: str) -> float:
    """The scale of a module.

    Args:
        config: Of `peft_config`.
        module: Its name in diffusers.
        rank: Rows of its A.
        alpha: What the file gives it in a tensor, if it does.
        where: The file, for messages.

    Raises:
        ValueError: If alpha is no sensible number, config and tensors contradict each other, or the config cannot be read.
    """
    declared = _declared_scale(config, module, rank, where) if config else None
    if alpha is None:
        return 1.0 if declared is None else declared
    is_number = alpha.tensor.numel() == 1 and alpha.tensor.itemsize > 1 and not alpha.tensor.is_complex()
    value = float(alpha.tensor) if is_number else math.nan
    scale = _checked(value, rank, "the rank", rank, alpha.key, where)
    if declared is not None and not math.isclose(scale, declared, rel_tol=0.01):  # alphas may be rounded to bfloat16
        raise ValueError(f"{where}: contradicts itself about {module}: scale {declared:g} by its metadata, {scale:g} by {alpha.key}.")
    return scale


def _declared_scale(config: Mapping[str, Any], module: str, rank: int, where: str) -> float:
    """alpha / r or alpha / sqrt(r) by the config."""
    try:
        alpha = float(_of_module(config, "alpha_pattern", "lora_alpha", module))
        given = _of_module(config, "rank_pattern", "r", module) if "r" in config else rank
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{where}: alphas of modules cannot be read from {DIFFUSERS_METADATA!r} of its metadata: {error!s:.200}."
        ) from error
    if given != rank:
        raise ValueError(f"{where}: contradicts itself about {module}: rank {given!r:.100} in its metadata, {rank} in its matrices.")
    source = "lora_alpha in its metadata"
    if config.get("use_rslora"):
        return _checked(alpha, math.sqrt(rank), "the square root of the rank", rank, source, where)
    return _checked(alpha, rank, "the rank", rank, source, where)


def _of_module(config: Mapping[str, Any], patterns: str, default: str, module: str) -> Any:
    """The value of the first pattern that is of a module, else the default."""
    return [*(value for name, value in (config.get(patterns) or {}).items() if _names(name, module)), config.get(default)][0]


def _checked(alpha: float, divisor: float, what: str, rank: int, source: str, where: str) -> float:
    scale = alpha / divisor
    if not SCALES[0] <= scale <= SCALES[1]:
        given = f"between {SCALES[0]:g} and {SCALES[1]:g} times {what} {rank}, got {alpha:g}"
        raise ValueError(f"{where}: {source} must be one number {given}. The file is damaged.")
    return scale


def _names(pattern: str, module: str) -> bool:
    """Whether a key of PEFT's patterns, a module's name or its end, is of this module."""
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"[\w.]+", name):
        raise ValueError(f"the pattern {pattern[:100]!r} is more than a name")
    return module == name or (not pattern.startswith("^") and module.endswith(f".{name}"))
