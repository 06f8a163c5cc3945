# What this project uses of diffusers 0.42.1, with the types that it means: diffusers itself leaves most of them open (a model's `config` is
# a dict, its attributes come from decorators and mixins). The one place where the type checker learns them; nothing here is run.
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel as FluxTransformer2DModel
from diffusers.utils import BaseOutput
from torch import Tensor, nn

class ConfigMixin:
    @classmethod
    def load_config(cls, path: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]: ...

class ModelMixin(ConfigMixin, nn.Module):
    dtype: torch.dtype
    device: torch.device
    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **kwargs: Any) -> Self: ...
    @classmethod
    def from_config(cls, config: Mapping[str, Any], **kwargs: Any) -> Self: ...
    def save_pretrained(self, folder: str | os.PathLike[str], **kwargs: Any) -> None: ...

class AutoencoderConfig(dict[str, Any]):
    latent_channels: int
    block_out_channels: Sequence[int]
    scaling_factor: float
    shift_factor: float
    sample_size: int

class EncoderOutput(BaseOutput):
    latent_dist: DiagonalGaussianDistribution

class DecoderOutput(BaseOutput):
    sample: Tensor

class AutoencoderKL(ModelMixin):
    config: AutoencoderConfig
    encoder: Any
    decoder: Any
    quant_conv: nn.Module | None
    def __init__(self, **config: Any) -> None: ...
    def encode(self, x: Tensor) -> EncoderOutput: ...
    def decode(self, z: Tensor) -> DecoderOutput: ...
    def register_to_config(self, **values: Any) -> None: ...
    def enable_tiling(self) -> None: ...
    def enable_slicing(self) -> None: ...

class UNetConfig(dict[str, Any]):
    block_out_channels: Sequence[int]

class UNet2DConditionModel(ModelMixin):
    config: UNetConfig
    up_blocks: Any  # lists of modules with lists of modules
    mid_block: Any
    def __init__(self, **config: Any) -> None: ...

class SchedulerMixin:
    config: Any
    timesteps: Tensor
    sigmas: Tensor
    def __init__(self, **config: Any) -> None: ...
    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **kwargs: Any) -> Self: ...
    def set_begin_index(self, begin_index: int = 0) -> None: ...
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None: ...
    def step(self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, **kwargs: Any) -> Any: ...
    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...

class FlowMatchEulerDiscreteScheduler(SchedulerMixin): ...
class DDIMScheduler(SchedulerMixin): ...

class FirstBlockCacheConfig:
    threshold: float
    def __init__(self, **settings: Any) -> None: ...

class MagCacheConfig:
    threshold: float
    def __init__(self, **settings: Any) -> None: ...

class GGUFQuantizationConfig:
    def __init__(self, compute_dtype: torch.dtype | None = None) -> None: ...

class VaeImageProcessor:
    def postprocess(self, image: Tensor, output_type: str = ...) -> Any: ...
    @staticmethod
    def numpy_to_pil(images: Any) -> list[Any]: ...

class DiffusionPipeline:
    config: Any
    dtype: torch.dtype
    device: torch.device
    components: dict[str, Any]
    _execution_device: torch.device
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self: ...
    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[type, ...]]: ...
    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None: ...
    def register_modules(self, **kwargs: Any) -> None: ...
    def register_to_config(self, **kwargs: Any) -> None: ...
    def to(self, *args: Any, **kwargs: Any) -> Self: ...
    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any: ...
    def set_progress_bar_config(self, **kwargs: Any) -> None: ...
    def maybe_free_model_hooks(self) -> None: ...
    def enable_model_cpu_offload(self, **kwargs: Any) -> None: ...
    def enable_sequential_cpu_offload(self, **kwargs: Any) -> None: ...

class FluxPipeline(DiffusionPipeline, FluxLoraLoaderMixin):
    transformer: FluxTransformer2DModel
    vae: AutoencoderKL
    text_encoder_2: nn.Module
    tokenizer: Any
    tokenizer_2: Any
    scheduler: FlowMatchEulerDiscreteScheduler
    image_processor: VaeImageProcessor
    vae_scale_factor: int
    interrupt: bool
    _callback_tensor_inputs: list[str]
    _guidance_scale: float
    _interrupt: bool
    _current_timestep: Tensor | None
    _num_timesteps: int
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    @staticmethod
    def _pack_latents(latents: Tensor, batch_size: int, num_channels_latents: int, height: int, width: int) -> Tensor: ...
    @staticmethod
    def _unpack_latents(latents: Tensor, height: int, width: int, vae_scale_factor: int) -> Tensor: ...
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        prompt_2: str | list[str] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        max_sequence_length: int = 512,
        lora_scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...
