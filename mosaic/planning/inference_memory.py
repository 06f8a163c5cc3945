"""Predicted memory of rendering one batch of pictures, by preset and stage.

As the training side does, the code itself runs on the meta device: one block of each kind (without gradients nothing of a block outlives
it), the VAE and T5. What a kernel allocates inside itself is not seen.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import T5Config, T5EncoderModel

from mosaic.config.loading import Config
from mosaic.method.grids import token_grid
from mosaic.method.tokens import position_ids, reference_position_ids, text_position_ids
from mosaic.model.attention_rows import CaptureRequest
from mosaic.model.costs import lora_parameter_count, width
from mosaic.model.reference_cache import reference_cache_bytes
from mosaic.pipeline.pipeline import DTYPES
from mosaic.planning.dry_run import build_transformer
from mosaic.planning.memory_model import CONTEXT, CONTEXT_BYTES, FORMAT_BYTES, QUANTIZED_BYTES, unpacked_bytes
from mosaic.planning.meta_kernels import kernels_of
from mosaic.planning.model_shape import ModelShape
from mosaic.planning.storage_meter import StorageMeter
from mosaic.rendering.memory_presets import MemoryPreset

TRANSFORMER, ADAPTER, ENCODERS, VAE, ACTIVATIONS = "transformer", "adapter", "text encoders", "VAE", "activations"
STAGES = ("prompts", "references", "steps", "decoding")
M = TypeVar("M", bound=nn.Module)
OFFLOADED_GROUPS = 3  # blocks on the device at a time: the one that computes, the one that comes, the one that goes


class Demand(NamedTuple):
    """The most that a picture of a run needs.

    Attributes:
        height: Of the picture, in px.
        width: Of the picture, in px.
        num_references: K.
        guided: Whether a step has a second pass, with zero latents in the references' place (`image_guidance_scale` other than 1); None: as
            `inference.image_guidance_scale` says.
        style_parameters: Numbers of the style LoRA; 0: there is none.
    """

    height: int
    width: int
    num_references: int
    guided: bool | None = None
    style_parameters: int = 0


@dataclass(frozen=True)
class InferenceMemory:
    """Predicted bytes.

    Attributes:
        stages: By stage, by part.
    """

    stages: Mapping[str, Mapping[str, int]]

    @property
    def fullest(self) -> str:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: sum(self.stages[stage].values()))

    @property
    def peak(self) -> int:
        """Bytes of the fullest stage."""
        return sum(self.stages[self.fullest].values())


def predict_inference(
    config: Config, shape: ModelShape, preset: MemoryPreset, demand: Demand, lora_rank: int, device_type: str = "cuda"
) -> InferenceMemory:
    """Bytes by stage and part of rendering one batch of `inference.batch_size` pictures.

    Args:
        config: The settings.
        shape: The base model's shape.
        preset: What is done to fit.
        demand: Each of the pictures.
        lora_rank: Of the reference LoRA; 0: there is none.
        device_type: "cuda" or "cpu", where what is offloaded is still in the memory that counts.

    Raises:
        ValueError: If a size does not fit the tokens.
    """
    transformer, adapter = weight_bytes(config, shape, preset, demand, lora_rank, device_type)
    element = FORMAT_BYTES[config.model.dtype]
    t5 = shape.encoders.get("text_encoder_2", 0) * (element if preset.text_encoder_2 == "none" else QUANTIZED_BYTES[preset.text_encoder_2])
    encoders = int(shape.encoders.get("text_encoder", 0) * element + t5)
    context = {CONTEXT: CONTEXT_BYTES} if device_type == "cuda" else {}
    rest = {TRANSFORMER: transformer, ADAPTER: adapter, VAE: shape.encoders.get("vae", 0) * element}
    early, late = ({}, {}) if preset.encoders_leave else (rest, {ENCODERS: encoders})
    side, dtype = config.data.reference_size, config.model.dtype
    work = {
        "prompts": text_activations(shape, config.model.text_length, dtype, device_type),
        "references": vae_activations(shape, preset, demand.num_references, side, side, dtype, device_type, encode=True),
        "steps": step_activations(config, shape, preset, demand, lora_rank, device_type),
        "decoding": vae_activations(
            shape, preset, config.inference.batch_size, demand.height, demand.width, dtype, device_type, encode=False
        ),
    }
    stages = {"prompts": {ENCODERS: encoders, **early}} | {stage: {**rest, **late} for stage in STAGES[1:]}
    return InferenceMemory({stage: {**parts, ACTIVATIONS: work[stage], **context} for stage, parts in stages.items()})


def weight_bytes(
    config: Config, shape: ModelShape, preset: MemoryPreset, demand: Demand, lora_rank: int, device_type: str
) -> tuple[int, int]:
    """Bytes of the transformer's weights and of its adapters' on the device."""
    element, adapter = FORMAT_BYTES[config.model.dtype], lora_parameter_count(shape.transformer, lora_rank) + demand.style_parameters
    blocks = shape.transformer["num_layers"] + shape.transformer["num_single_layers"]
    one_of_each = replace(shape, transformer={**shape.transformer, "num_layers": 1, "num_single_layers": 1})
    two_of_each = replace(shape, transformer={**shape.transformer, "num_layers": 2, "num_single_layers": 2})
    outside = 2 * one_of_each.base_parameters - two_of_each.base_parameters  # embedders and exit, never quantised
    if config.inference.gguf is not None:
        transformer = os.path.getsize(config.inference.gguf)
    else:
        per_weight = element if preset.transformer == "none" else QUANTIZED_BYTES[preset.transformer]
        transformer = int(outside * element + (shape.base_parameters - outside) * per_weight)
    if preset.group_offload and device_type != "cpu":
        d = width(shape.transformer)  # a double-stream block, the larger kind: 12 d^2 weights and 6 d^2 of AdaLN per stream
        share = min(1.0, OFFLOADED_GROUPS * 36 * d * d / shape.base_parameters)
        return int(outside * element + transformer * share), int(element * adapter * min(1.0, OFFLOADED_GROUPS / blocks))
    return transformer, element * adapter


def step_activations(config: Config, shape: ModelShape, preset: MemoryPreset, demand: Demand, lora_rank: int, device_type: str) -> int:
    """Bytes that a sampling step needs beside the weights: the fullest moment of the forward pass, maps and cached keys included."""
    settings, side = config.inference, config.data.reference_size
    key = (config.data.reference_size, config.model.text_length, config.model.dtype, config.model.reference_attention)
    picture, maps = Demand(*demand[:3]), settings.report and lora_rank > 0
    one = _forward_bytes(_Frozen(shape), picture, lora_rank, device_type, maps, *key)
    total = one * settings.batch_size
    element = FORMAT_BYTES[config.model.dtype]
    if preset.transformer != "none":
        target = token_grid(demand.height, demand.width, shape.vae_scale_factor, where="height, width").num_tokens
        reference = token_grid(side, side, shape.vae_scale_factor, where="data.reference_size").num_tokens
        tokens = config.model.text_length + target + (demand.num_references * reference if lora_rank else 0)
        total += unpacked_bytes(shape, preset.transformer, element, settings.batch_size * tokens, trains=False)
    if lora_rank and (settings.reference_cache or (settings.refresh_references or 1) > 1):
        tokens = token_grid(side, side, shape.vae_scale_factor, where="data.reference_size").num_tokens
        sizes = (demand.num_references, tokens, settings.batch_size, element)
        total += reference_cache_bytes(shape.transformer, *sizes, with_attention=maps)
        if settings.image_guidance_scale != 1 if demand.guided is None else demand.guided:
            total += reference_cache_bytes(shape.transformer, *sizes)  # the second pass keeps its own, and is read for no map
    return total


class _Frozen:
    """A shape as a key: shapes hold dictionaries, which cannot be one."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self._key = repr(shape)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and self._key == other._key


@cache
def _forward_bytes(
    frozen: _Frozen,
    demand: Demand,
    lora_rank: int,
    device_type: str,
    maps: bool,
    reference_size: int,
    text_length: int,
    dtype_name: str,
    reference_attention: str,
) -> int:
    """Bytes alive at the fullest moment of one forward pass on one picture, inputs included, weights not."""
    shape, dtype = frozen.shape, DTYPES[dtype_name]
    target = token_grid(demand.height, demand.width, shape.vae_scale_factor, where="height, width")
    reference = token_grid(reference_size, reference_size, shape.vae_scale_factor, where="data.reference_size")
    references, channels = demand.num_references if lora_rank else 0, shape.transformer["in_channels"]
    transformer = _shallow_transformer(frozen, lora_rank, dtype_name)

    def tensor(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    meter = StorageMeter()
    with meter, torch.no_grad(), kernels_of(device_type):
        inputs: dict[str, Any] = {
            "hidden_states": tensor(1, target.num_tokens, channels),
            "encoder_hidden_states": tensor(1, text_length, shape.transformer["joint_attention_dim"]),
            "pooled_projections": tensor(1, shape.transformer["pooled_projection_dim"]),
            "timestep": tensor(1),
            "guidance": torch.empty(1, device="meta") if shape.transformer["guidance_embeds"] else None,
            "img_ids": position_ids(target, device=torch.device("meta")),
            "txt_ids": text_position_ids(text_length).to("meta"),
        }
        if references:
            inputs["reference_hidden_states"] = tensor(1, references, reference.num_tokens, channels)
            inputs["reference_ids"] = reference_position_ids(reference, references, torch.device("meta"))
            inputs["reference_attention"] = reference_attention
            if maps:
                inputs["capture"] = CaptureRequest(torch.empty(1, references * reference.num_tokens, dtype=torch.int64, device="meta"))
        output = transformer(**inputs)
        del output
    rows = references * reference.num_tokens * target.num_tokens * 4 if maps else 0
    return meter.peak.total() + 2 * rows  # the sum over the steps, and this step's share of it


@cache
def _shallow_transformer(frozen: _Frozen, lora_rank: int, dtype: str) -> nn.Module:
    """One block of each kind on the meta device, all weights in one format."""
    shallow = replace(frozen.shape, transformer={**frozen.shape.transformer, "num_layers": 1, "num_single_layers": 1})
    base = Config()
    config = base.replace(
        model=base.model.replace(dtype=dtype, gradient_checkpointing="none"),
        lora=base.lora.replace(rank=max(lora_rank, 1)),
    )
    return _in_format(build_transformer(config, shallow), dtype)


def _in_format(model: M, dtype: str) -> M:
    """The model, frozen, all its weights in one number format."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    return model.requires_grad_(False).eval()


def vae_activations(
    shape: ModelShape, preset: MemoryPreset, num_pictures: int, height: int, width_: int, dtype: str, device_type: str, encode: bool
) -> int:
    """Bytes that the VAE needs beside its weights to encode pictures, or to decode their latents; 0 for none."""
    return num_pictures and _vae_bytes(_Frozen(shape), preset.vae_tiling, num_pictures, height, width_, dtype, device_type, encode)


@cache
def _vae_bytes(
    frozen: _Frozen, tiling: bool, num_pictures: int, height: int, width_: int, dtype: str, device_type: str, encode: bool
) -> int:
    shape = frozen.shape
    with torch.device("meta"):
        vae = _in_format(AutoencoderKL(**shape.vae), dtype)
    if tiling:
        vae.enable_tiling()
        vae.enable_slicing()
    scale = shape.vae_scale_factor
    size = (3, height, width_) if encode else (vae.config.latent_channels, height // scale, width_ // scale)
    meter = StorageMeter()
    with meter, torch.no_grad(), kernels_of(device_type):
        given = torch.empty(num_pictures, *size, dtype=DTYPES[dtype], device="meta")
        result = vae.encode(given).latent_dist.mode() if encode else vae.decode(given).sample
        del result
    return meter.peak.total()


def text_activations(shape: ModelShape, text_length: int, dtype: str, device_type: str) -> int:
    """Bytes that T5 needs beside its weights to encode a prompt."""
    return _text_bytes(_Frozen(shape), text_length, dtype, device_type)


@cache
def _text_bytes(frozen: _Frozen, text_length: int, dtype: str, device_type: str) -> int:
    if not frozen.shape.t5:
        return 0
    with torch.device("meta"):
        encoder = _in_format(T5EncoderModel(T5Config(**{**frozen.shape.t5, "num_layers": 1})), dtype)
        tokens = torch.zeros(1, text_length, dtype=torch.int64)
        meter = StorageMeter()
        with meter, torch.no_grad(), kernels_of(device_type):
            result = encoder(tokens)
            del result
    return meter.peak.total()
