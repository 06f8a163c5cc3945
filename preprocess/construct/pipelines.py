"""Pipelines of diffusers, of any class, loaded and placed as their settings say."""

import hashlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mosaic.config.schema import FieldError
from mosaic.files import in_one_line
from mosaic.rendering.memory_presets import PLAIN, PRESETS
from mosaic.weights.components import component_revision
from mosaic.weights.frozen import call_loader, short_digest
from mosaic.weights.hub import resolve_style_lora_file
from mosaic.weights.quantization import check_quantization, quantize_base
from preprocess.construct.pipeline_settings import PipelineSettings

TRANSFORMER = "transformer"
COMMIT = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]")  # in the paths of the hub's local store


@dataclass(frozen=True)
class Means:
    """How a pipeline is made to fit a device.

    Attributes:
        quantization: Of the transformer: "none", "nf4", "int8" or "fp8".
        offload: "none", "model" or "group".
        vae_tiling: The VAE works on one picture, and on one part of it, at a time.
    """

    quantization: str
    offload: str
    vae_tiling: bool


def means_of(settings: PipelineSettings) -> Means:
    """The preset's means with those that the settings name themselves.

    Raises:
        FieldError: nf4 matrices cannot be moved block by block.
        ValueError: A package is missing.
    """
    preset = PRESETS.get(settings.memory, PLAIN)
    offload = "group" if preset.group_offload else "model" if preset.encoders_leave else "none"
    means = Means(settings.quantization or preset.transformer, settings.offload or offload, preset.vae_tiling)
    place = f"{settings.path}.quantization"
    if means.quantization == "nf4" and means.offload == "group":
        raise FieldError(place, 'cannot be "nf4" where blocks wait in CPU memory (offload "group"); use int8')
    check_quantization(means.quantization, place)
    return means


def load_pipeline(cls: Any, settings: PipelineSettings, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a pipeline with its LoRA onto a device, without progress bars.

    Args:
        cls: Class with `from_pretrained`, such as `AutoPipelineForText2Image` or `FluxKontextPipeline`.
        settings: Of the stage.
        device: Where it computes.
        dtype: Number format of all weights that are not quantised.

    Raises:
        FileNotFoundError: The model is neither a folder nor a hub id.
        ValueError: It cannot be had, is damaged, holds no safetensors, is of another class, or cannot do what the settings ask for.
    """
    means, place = means_of(settings), settings.path
    revision = {"revision": settings.revision} if settings.revision is not None else {}
    pipeline = call_loader(cls, settings.model, f"{place}.model", dtype=dtype, use_safetensors=True, **revision)
    pipeline.set_progress_bar_config(disable=True)
    if settings.lora is not None:
        merge_lora(pipeline, settings.lora, settings.lora_scale, f"{place}.lora")
    if means.quantization != "none":
        if not isinstance(getattr(pipeline, TRANSFORMER, None), nn.Module):
            raise FieldError(
                f"{place}.quantization", f"needs a pipeline with a transformer, and {type(pipeline).__name__} has none; use none"
            )
        quantize_base(pipeline.transformer, means.quantization, device)
    place_pipeline(pipeline, means, device)
    return pipeline


def merge_lora(pipeline: Any, source: str, scale: float, flag: str) -> None:
    """Add a LoRA, times a scale, to the weights of a pipeline.

    Raises:
        FileNotFoundError, OSError: It cannot be had.
        ValueError: It does not fit.
    """
    file = resolve_style_lora_file(source)
    if not hasattr(pipeline, "load_lora_weights"):
        raise ValueError(f"{flag}: {type(pipeline).__name__} takes no LoRA; use null.")
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, use_safetensors=True)
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{flag}: {file} is no LoRA of {type(pipeline).__name__} ({in_one_line(error, 300, with_kind=True)}).") from error


def place_pipeline(pipeline: Any, means: Means, device: torch.device) -> None:
    """Bring a loaded pipeline to its device."""
    if means.vae_tiling and hasattr(pipeline.vae, "enable_tiling"):
        pipeline.vae.enable_tiling()
        pipeline.vae.enable_slicing()
    if device.type == "cpu":
        pipeline.to(device)
    elif means.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif means.offload == "group":
        place_groups(pipeline, device)
    else:
        pipeline.to(device)


def place_groups(pipeline: Any, device: torch.device) -> None:
    """The denoiser comes to the device block by block, text encoders layer by layer; the VAE stays on it."""
    streams = device.type == "cuda"
    models: dict[str, Any] = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    for name, model in models.items():
        if name in (TRANSFORMER, "unet"):
            model.enable_group_offload(device, torch.device("cpu"), "block_level", num_blocks_per_group=1, use_stream=streams)
        elif name.startswith("text_encoder"):
            from diffusers.hooks.group_offloading import apply_group_offloading

            apply_group_offloading(model, device, torch.device("cpu"), "leaf_level", use_stream=streams)
        else:
            model.to(device)


def call_arguments(pipeline: Any, settings: PipelineSettings) -> dict[str, Any]:
    """What a pipeline is called with of its stage's settings, beside prompts, sizes and noise.

    Raises:
        FieldError: It does not take one of them.
    """
    names = ("num_inference_steps", "guidance_scale", "true_cfg_scale", "negative_prompt", "max_sequence_length")
    found = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    taken = inspect.signature(pipeline.__call__).parameters
    for name in found:
        if name not in taken:
            raise FieldError(f"{settings.path}.{name}", f"is none of the arguments of {type(pipeline).__name__}; use null")
    return found


def pipeline_provenance(pipeline: Any, settings: PipelineSettings, dtype: torch.dtype) -> dict[str, Any]:
    """What a pipeline's results depend on beside how it is called: its class, weights and number formats, as JSON values."""
    folder = Path(settings.model)
    return {
        "pipeline": type(pipeline).__name__,
        "model": folder.resolve().name if folder.is_dir() else settings.model,
        "revision": _digest(pipeline, folder) if folder.is_dir() else _commit(pipeline),
        "lora": None if settings.lora is None else short_digest(resolve_style_lora_file(settings.lora)),
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": means_of(settings).quantization,
    }


def _digest(pipeline: Any, folder: Path) -> str:
    """SHA-256 over all components of a local folder."""
    names = sorted(name for name, part in pipeline.components.items() if part is not None and (folder / name).is_dir())
    return hashlib.sha256("\n".join(f"{name} {component_revision(folder / name)}" for name in names).encode()).hexdigest()


def _commit(pipeline: Any) -> str:
    """The commit of a hub id, read from where its models came from; "": they do not say."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            name = getattr(part, "name_or_path", "") or getattr(getattr(part, "config", None), "_name_or_path", "")
            found = COMMIT.search(f"{name}/")
            if found:
                return found.group(1)
    return ""
