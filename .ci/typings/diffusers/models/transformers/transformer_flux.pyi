from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Self

from diffusers import ModelMixin
from diffusers.models.embeddings import CombinedTimestepGuidanceTextProjEmbeddings
from torch import Tensor, nn

class FluxConfig(dict[str, Any]):
    num_layers: int
    num_single_layers: int
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    joint_attention_dim: int
    pooled_projection_dim: int
    guidance_embeds: bool
    axes_dims_rope: tuple[int, ...]

class FluxAttnProcessor:
    _attention_backend: Any
    _parallel_config: Any

class FluxAttention(nn.Module):
    head_dim: int
    heads: int
    processor: FluxAttnProcessor
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    to_out: nn.ModuleList
    to_add_out: nn.Module
    add_q_proj: nn.Module
    add_k_proj: nn.Module
    add_v_proj: nn.Module
    norm_q: nn.Module
    norm_k: nn.Module
    norm_added_q: nn.Module
    norm_added_k: nn.Module

class AdaLayerNorm(nn.Module):
    linear: nn.Module
    silu: nn.Module
    norm: nn.Module

class FeedForward(nn.Module):
    net: Any  # GELU with `proj`, dropout, linear

class FluxTransformerBlock(nn.Module):
    norm1: AdaLayerNorm
    norm1_context: AdaLayerNorm
    norm2: nn.Module
    norm2_context: nn.Module
    attn: FluxAttention
    ff: FeedForward
    ff_context: FeedForward

class FluxSingleTransformerBlock(nn.Module):
    norm: AdaLayerNorm
    proj_mlp: nn.Module
    act_mlp: nn.Module
    proj_out: nn.Module
    attn: FluxAttention

class FluxTransformer2DModel(ModelMixin):
    config: FluxConfig
    peft_config: dict[str, Any]
    gradient_checkpointing: bool
    is_cache_enabled: bool
    x_embedder: nn.Module
    context_embedder: nn.Module
    time_text_embed: CombinedTimestepGuidanceTextProjEmbeddings
    pos_embed: Callable[[Tensor], tuple[Tensor, Tensor]]
    transformer_blocks: nn.ModuleList
    single_transformer_blocks: nn.ModuleList
    norm_out: Any  # AdaLayerNormContinuous
    proj_out: nn.Linear
    _cache_config: Any
    _hf_peft_config_loaded: bool | None
    _gradient_checkpointing_func: Callable[..., Any]
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    @classmethod
    def from_single_file(cls, path: str, **kwargs: Any) -> Self: ...
    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None: ...
    def disable_gradient_checkpointing(self) -> None: ...
    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None: ...
    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None: ...
    def set_attention_backend(self, backend: str) -> None: ...
    def reset_attention_backend(self) -> None: ...
    def enable_cache(self, config: Any) -> None: ...
    def disable_cache(self) -> None: ...
    def cache_context(self, name: str) -> AbstractContextManager[None]: ...
    def _reset_stateful_cache(self, recurse: bool = True) -> None: ...
    def add_adapter(self, config: Any, adapter_name: str = "default") -> None: ...
    def set_adapter(self, adapter_name: str | list[str]) -> None: ...
    def delete_adapters(self, adapter_names: str | list[str]) -> None: ...
    def load_lora_adapter(self, source: Mapping[str, Tensor], prefix: str = "transformer", **kwargs: Any) -> None: ...
