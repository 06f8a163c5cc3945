"""The reference LoRA of a file: checked, read, and loaded into a FLUX transformer.

Beside the published keys `transformer.<module>.lora_A.weight` it takes what diffusers and PEFT make of them: keys without
`transformer.`, keys ending in `.default.weight`, alphas in tensors or in the metadata. The scale they give is taken into the factors.
"""

import logging
import os
from collections.abc import Mapping

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from mosaic.lora.adapter import PREFIX, activate_styles, active_styles, detach_reference_lora, reference_lora_modules, shorten
from mosaic.lora.files import LoraFile, check_finite
from mosaic.lora.formats import FORMAT_NAMES, NUMBER_FORMATS, fold_scale, read_module
from mosaic.lora.keys import LoraKeys, find_modules, is_text_encoder_key, peft_hint, read_plain_key
from mosaic.lora.scales import Alpha, module_scale, peft_config
from mosaic.lora.zeros import ALL_ZERO
from mosaic.model.branch import ADAPTER_NAME

logger = logging.getLogger(__name__)


def read_reference_lora(source: str | os.PathLike | LoraFile, transformer: FluxTransformer2DModel) -> tuple[dict[str, Tensor], int]:
    """Read and check a reference LoRA file against a transformer; nothing is attached.

    Args:
        source: A safetensors file, or one that is open already, with keys `transformer.<module>.lora_A.weight` and `.lora_B.weight`, or
            others that name the same modules.
        transformer: Whose modules and widths the file must fit.

    Returns:
        The tensors by the keys `transformer.<module>.lora_A.weight` and `.lora_B.weight`, of scale 1, and the rank.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no safetensors file, keys are missing or unexpected, ranks differ, a shape does not fit, a value is not
            finite, or it is more than a plain LoRA.
    """
    file = source if isinstance(source, LoraFile) else LoraFile(source, "reference LoRA")
    rank = check_reference_lora(file, transformer)
    where, tensors = str(file.path), {}
    config = peft_config(file.metadata, where)
    for name, keys in _find_reference_modules(file, transformer).items():
        a, b, scale = read_module(file, keys, config, where)
        if scale != 1:
            a, b = fold_scale(a.float(), b.float(), scale)
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = a, b
    return tensors, rank


def check_reference_lora(file: LoraFile, transformer: FluxTransformer2DModel) -> int:
    """Check keys, number formats, shapes and scales of a reference LoRA against a transformer; matrices are not read.

    Args:
        file: The file, open.
        transformer: Whose modules and widths the file must fit; it may be on the meta device.

    Returns:
        The rank.

    Raises:
        ValueError: If keys are missing or unexpected, a tensor is no floating point matrix, ranks differ between modules or are 0, a
            shape does not fit, or its metadata or alphas cannot be honoured.
    """
    where = str(file.path)
    config = peft_config(file.metadata, where)
    modules = _find_reference_modules(file, transformer)
    for key in sorted(key for keys in modules.values() for key in (keys.down, keys.up)):
        if len(file.shape(key)) != 2 or file.dtype(key) not in NUMBER_FORMATS:
            raise ValueError(f"{where}: {key} must be a matrix of {FORMAT_NAMES}, got {file.dtype(key)} of shape {file.shape(key)}.")
    ranks = {file.shape(keys.down)[0] for keys in modules.values()}
    if len(ranks) != 1:
        raise ValueError(f"{where}: all modules must have one rank, got ranks {sorted(ranks)}.")
    rank = ranks.pop()
    if rank == 0:
        raise ValueError(f"{where}: the rank must be positive, got matrices of rank 0.")
    for name, keys in modules.items():
        layer = transformer.get_submodule(name)
        for key, wanted in ((keys.down, (rank, layer.in_features)), (keys.up, (layer.out_features, rank))):
            if file.shape(key) != wanted:
                raise ValueError(f"{where}: {key} must have shape {wanted}, got {file.shape(key)}. Is it for another base model?")
        module_scale(config, name, rank, None if keys.alpha is None else Alpha(keys.alpha, file[keys.alpha]), where)
    return rank


def _find_reference_modules(file: LoraFile, transformer: FluxTransformer2DModel) -> dict[str, LoraKeys]:
    """The keys of the reference LoRA's modules, by module.

    Raises:
        ValueError: If keys are missing, unexpected or given twice.
    """
    where, modules = file.path, reference_lora_modules(transformer)
    found: dict[str, dict[str, str]] = {name: {} for name in modules}
    unexpected = []
    for key in file:
        name, side = read_plain_key(key) or ("", "")
        if name not in found:
            unexpected.append(key)
        elif side in found[name]:
            raise ValueError(f"{where}: {found[name][side]} and {key} are of one module. A file must give each matrix once.")
        else:
            found[name][side] = key
    sides = {"down": "lora_A", "up": "lora_B"}
    missing = sorted(f"{PREFIX}{name}.{sides[side]}.weight" for name, given in found.items() for side in sides if side not in given)
    if missing or unexpected:
        raise ValueError(
            f"{where}: keys do not match this transformer's reference LoRA ({len(modules)} modules). Missing {len(missing)}: "
            f"{shorten(missing)}. Unexpected {len(unexpected)}: {shorten(sorted(unexpected))}.{_cure(file, modules)}"
        )
    return {name: LoraKeys("diffusers", name, (name,), given["down"], given["up"], given.get("alpha")) for name, given in found.items()}


def _cure(file: LoraFile, modules: list[str]) -> str:
    """What to do with a file that holds this reference LoRA in the keys of another program, or with LoRAs of text encoders."""
    own = [key for key in file if not is_text_encoder_key(key)]
    try:
        parts = {part for keys in find_modules(own, str(file.path)).values() for part in keys.parts}
    except ValueError:
        return peft_hint(own)
    flag = "" if len(own) == len(file) else " --transformer-only"
    return f" `python scripts/lora_tools.py import{flag}` makes its keys ours." if parts == set(modules) else ""


def load_reference_lora(transformer: FluxTransformer2DModel, source: str | os.PathLike | LoraFile, pipeline: object | None = None) -> int:
    """Load a reference LoRA file, replacing one that is attached; the rank is read from the file.

    Args:
        transformer: Gets the adapter, in its own dtype and on its own device.
        source: A safetensors file, or one that is open already.
        pipeline: The diffusers pipeline that owns the transformer, if any, so that offload hooks are renewed.

    Returns:
        The rank.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If keys, shapes, values or scales are not those of a reference LoRA of this transformer.
    """
    file = source if isinstance(source, LoraFile) else LoraFile(source, "reference LoRA")
    tensors, rank = read_reference_lora(file, transformer)
    tensors = in_dtype_of(transformer, tensors, f"reference LoRA {file.path}")
    detach_reference_lora(transformer)
    styles = active_styles(transformer)
    transformer.load_lora_adapter(tensors, prefix="transformer", adapter_name=ADAPTER_NAME, _pipeline=pipeline)
    activate_styles(transformer, styles)
    transformer.requires_grad_(False)
    return rank


def in_dtype_of(transformer: FluxTransformer2DModel, tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """LoRA tensors in a transformer's number format, bfloat16 beside quantised weights; warns if all of them are zero there.

    Args:
        transformer: It.
        tensors: By the keys `transformer.<module>.lora_A.weight` and `.lora_B.weight`.
        what: Kind and file, for messages.

    Raises:
        ValueError: If a number is too large for the format.
    """
    dtype = transformer.dtype if transformer.dtype.is_floating_point else torch.bfloat16
    converted = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    for key, tensor in converted.items():
        check_finite(tensor, key, f"{what} as {dtype}")
    pairs = [(a, converted[key.replace(".lora_A.", ".lora_B.")]) for key, a in converted.items() if ".lora_A." in key]
    if not any(a.any() and b.any() for a, b in pairs):
        logger.warning("%s: %s.", what, ALL_ZERO)
    return converted
