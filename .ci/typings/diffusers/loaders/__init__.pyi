import os
from typing import Any

from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

LoraSource = str | os.PathLike[str] | dict[str, Tensor]

class FluxLoraLoaderMixin:
    transformer: FluxTransformer2DModel
    text_encoder: nn.Module | None
    num_fused_loras: int
    @classmethod
    def lora_state_dict(cls, source: LoraSource, **kwargs: Any) -> dict[str, Tensor]: ...
    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: LoraSource, adapter_name: str | None = None, **kwargs: Any
    ) -> None: ...
    def unload_lora_weights(self, **kwargs: Any) -> None: ...
    def fuse_lora(self, *args: Any, **kwargs: Any) -> None: ...
    def unfuse_lora(self, *args: Any, **kwargs: Any) -> None: ...
    def set_adapters(self, adapter_names: str | list[str], adapter_weights: float | list[float] | None = None) -> None: ...
