"""The reference LoRA as PEFT adapters on a FLUX transformer: attached, written, removed.

How it acts is in `mosaic.model.branch`, how it is loaded in `mosaic.lora.loading`. Files keep the published keys
`transformer.<module>.lora_A.weight` / `.lora_B.weight`; there is no alpha in them, so the scale is 1.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from diffusers import FluxTransformer2DModel
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mosaic.lora.files import METADATA_KEY, write_tensors
from mosaic.model.branch import ADAPTER_NAME

PREFIX = "transformer."
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


def shorten(keys: list[str], most: int = 6) -> str:
    """The first of some keys, each cut to 120 letters, and how many more there are."""
    if not keys:
        return "none"
    return ", ".join(key[:120] for key in keys[:most]) + (f", ... ({len(keys) - most} more)" if len(keys) > most else "")


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
