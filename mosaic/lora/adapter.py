"""The reference LoRA as PEFT adapters on a FLUX transformer: attached, read, checked, written, removed.

How it acts is in `mosaic.model.branch`. Files keep the published keys `transformer.<module>.lora_A.weight` /
`.lora_B.weight`; there is no alpha in them, so the scale is 1.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mosaic.lora.files import METADATA_KEY, LoraFile, check_finite, write_tensors
from mosaic.model.branch import ADAPTER_NAME

PREFIX = "transformer."
FOREIGN = ("lora_unet_", "diffusion_model.", "base_model.model.")  # of the same keys in the styles of kohya, ComfyUI and fal
DOUBLE_STREAM_TARGETS = ("norm1.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.2")
SINGLE_STREAM_TARGETS = ("norm.linear", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v")


def reference_lora_modules(transformer: FluxTransformer2DModel) -> list[str]:
    """Names of all modules that carry the reference LoRA; 343 on FLUX.1-dev."""
    return reference_module_names(len(transformer.transformer_blocks), len(transformer.single_transformer_blocks))


def reference_module_names(num_double: int, num_single: int) -> list[str]:
    """Names of all modules that carry the reference LoRA, on a transformer of so many double-stream and single-stream blocks."""
    names = ["x_embedder"]
    for index in range(num_double):
        names += [f"transformer_blocks.{index}.{target}" for target in DOUBLE_STREAM_TARGETS]
    for index in range(num_single):
        names += [f"single_transformer_blocks.{index}.{target}" for target in SINGLE_STREAM_TARGETS]
    return names


def has_reference_lora(transformer: nn.Module) -> bool:
    """Whether the reference LoRA is attached."""
    return ADAPTER_NAME in getattr(transformer, "peft_config", {})


def attach_reference_lora(transformer: FluxTransformer2DModel, rank: int) -> None:
    """Attach a fresh reference LoRA: A gaussian, B zero, alpha = rank, no dropout. Base weights are frozen by this.

    Raises:
        ValueError: If the rank is not a positive integer, or a reference LoRA is attached already.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"lora.rank must be a positive integer, got {rank!r}.")
    if has_reference_lora(transformer):
        raise ValueError("a reference LoRA is attached already; detach_reference_lora() it first.")
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=reference_lora_modules(transformer))
    styles = active_styles(transformer)
    transformer.add_adapter(config, adapter_name=ADAPTER_NAME)
    activate_styles(transformer, styles)
    transformer.requires_grad_(False)
    for parameter in reference_lora_parameters(transformer).values():
        parameter.requires_grad_(True)


def detach_reference_lora(transformer: FluxTransformer2DModel) -> None:
    """Remove the reference LoRA; the base weights, never written to, are what they were. Other adapters stay."""
    if not has_reference_lora(transformer):
        return
    if set(transformer.peft_config) == {ADAPTER_NAME}:
        recurse_remove_peft_layers(transformer)
        del transformer.peft_config
        transformer._hf_peft_config_loaded = None
    else:
        delete_adapters(transformer, [ADAPTER_NAME])


def reference_lora_parameters(transformer: FluxTransformer2DModel) -> dict[str, nn.Parameter]:
    """The trainable parameters by file key (`transformer.<module>.lora_A.weight`).

    Raises:
        ValueError: If no reference LoRA is attached.
    """
    if not has_reference_lora(transformer):
        raise ValueError("no reference LoRA is attached; call attach_reference_lora() or load_reference_lora() first.")
    parameters = {}
    for name in reference_lora_modules(transformer):
        layer: LoraLayer = transformer.get_submodule(name)
        parameters[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A[ADAPTER_NAME].weight
        parameters[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B[ADAPTER_NAME].weight
    return parameters


def save_reference_lora(transformer: FluxTransformer2DModel, path: str | os.PathLike, config: Mapping | None = None) -> Path:
    """Write the reference LoRA as one safetensors file, aside first, then renamed.

    Args:
        transformer: With the reference LoRA attached.
        path: The file to write; its folder is made.
        config: JSON-able description (the resolved config), kept in the file's metadata.

    Raises:
        ValueError: If no reference LoRA is attached.
    """
    tensors = {key: p.detach().cpu().contiguous() for key, p in reference_lora_parameters(transformer).items()}
    return write_reference_lora(tensors, path, config)


def write_reference_lora(tensors: Mapping[str, Tensor], path: str | os.PathLike, config: Mapping | None = None) -> Path:
    """Write reference LoRA tensors (keys as in the file) to `path`, aside first, then renamed."""
    return write_tensors(tensors, path, {METADATA_KEY: json.dumps({"adapter": ADAPTER_NAME, "config": dict(config or {})})})


def read_reference_lora(source: str | os.PathLike | LoraFile, transformer: FluxTransformer2DModel) -> tuple[dict[str, Tensor], int]:
    """Read and check a reference LoRA file against a transformer; nothing is attached.

    Args:
        source: A safetensors file, or one that is open already, with keys `transformer.<module>.lora_A.weight` and `.lora_B.weight`.
        transformer: Whose modules and widths the file must fit.

    Returns:
        The tensors by file key, and the rank.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no safetensors file, keys are missing or unexpected, ranks differ, a shape does not fit, or a value is not
            finite.
    """
    file = source if isinstance(source, LoraFile) else LoraFile(source, "reference LoRA")
    rank = check_reference_lora(file, transformer)
    tensors = {key: file[key] for key in file}
    for key in sorted(tensors):
        check_finite(tensors[key], key, str(file.path))
    return tensors, rank


def check_reference_lora(file: LoraFile, transformer: FluxTransformer2DModel) -> int:
    """Check keys, number formats and shapes of a reference LoRA against a transformer; only the file's header is read.

    Args:
        file: The file, open.
        transformer: Whose modules and widths the file must fit; it may be on the meta device.

    Returns:
        The rank.

    Raises:
        ValueError: If keys are missing or unexpected, a tensor is no floating point matrix, ranks differ between modules or are 0, or a
            shape does not fit.
    """
    where, modules = file.path, reference_lora_modules(transformer)
    expected = {f"{PREFIX}{name}.lora_{side}.weight" for name in modules for side in "AB"}
    missing, unexpected = sorted(expected - set(file)), sorted(set(file) - expected)
    if missing or unexpected:
        cure = " `python scripts/lora_tools.py import` makes its keys ours." if unexpected and unexpected[0].startswith(FOREIGN) else ""
        raise ValueError(
            f"{where}: keys do not match this transformer's reference LoRA ({len(modules)} modules). "
            f"Missing {len(missing)}: {shorten(missing)}. Unexpected {len(unexpected)}: {shorten(unexpected)}.{cure}"
        )
    shapes = {key: file.shape(key) for key in sorted(expected)}
    for key, shape in shapes.items():
        if len(shape) != 2 or not file.dtype(key).startswith(("F", "BF")):
            raise ValueError(f"{where}: {key} must be a floating point matrix, got {file[key].dtype} of shape {shape}.")
    ranks = {shapes[f"{PREFIX}{name}.lora_A.weight"][0] for name in modules}
    if len(ranks) != 1:
        raise ValueError(f"{where}: all modules must have one rank, got ranks {sorted(ranks)}.")
    rank = ranks.pop()
    if rank == 0:
        raise ValueError(f"{where}: the rank must be positive, got matrices of rank 0.")
    for name in modules:
        layer = transformer.get_submodule(name)
        for side, wanted in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
            key = f"{PREFIX}{name}.lora_{side}.weight"
            if shapes[key] != wanted:
                raise ValueError(f"{where}: {key} must have shape {wanted}, got {shapes[key]}. Is it for another base model?")
    return rank


def shorten(keys: list[str], most: int = 6) -> str:
    """The first of some keys, each cut to 120 letters, and how many more there are."""
    if not keys:
        return "none"
    return ", ".join(key[:120] for key in keys[:most]) + (f", ... ({len(keys) - most} more)" if len(keys) > most else "")


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
        ValueError: If keys, shapes or values are not those of a reference LoRA of this transformer.
    """
    tensors, rank = read_reference_lora(source, transformer)
    detach_reference_lora(transformer)
    dtype = transformer.dtype if transformer.dtype.is_floating_point else torch.bfloat16
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    styles = active_styles(transformer)
    transformer.load_lora_adapter(tensors, prefix="transformer", adapter_name=ADAPTER_NAME, _pipeline=pipeline)
    activate_styles(transformer, styles)
    transformer.requires_grad_(False)
    return rank


def active_styles(transformer: FluxTransformer2DModel) -> list[str]:
    """Names of the active adapters other than the reference LoRA."""
    layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
    return sorted({name for layer in layers for name in layer.active_adapters if name != ADAPTER_NAME})


def activate_styles(transformer: FluxTransformer2DModel, styles: list[str]) -> None:
    """Make these adapters the active ones again: loading an adapter leaves only that one active."""
    if styles:
        transformer.set_adapter(styles)


def delete_adapters(transformer: FluxTransformer2DModel, names: list[str]) -> None:
    """Delete adapters and leave the others as they are, active or not.

    An active adapter is made inactive first: PEFT puts another one in the place of a deleted one, wanted or not.
    """
    trainable = {id(parameter) for parameter in transformer.parameters() if parameter.requires_grad}
    transformer.set_adapter([name for name in active_styles(transformer) if name not in names])
    transformer.delete_adapters(names)
    for parameter in transformer.parameters():
        parameter.requires_grad_(id(parameter) in trainable)
