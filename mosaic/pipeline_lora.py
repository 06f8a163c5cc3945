"""Loading LoRAs into the pipeline: the reference LoRA, and diffusers' style LoRAs beside it."""

import os
from typing import Any

from diffusers.loaders.lora_base import _remove_text_encoder_monkey_patch
from torch import Tensor

from mosaic import lora
from mosaic.hub import resolve_lora_file
from mosaic.lora_files import LoraFile, reference_metadata


class ReferenceLoraLoaderMixin:
    """The pipeline's methods for LoRAs. It comes before diffusers' own loader among the bases, whose methods it guards."""

    reference_config: dict[str, Any]
    """The resolved training config that the loaded reference LoRA's file carries; empty if it carries none."""

    def load_reference_lora(self, source: str | os.PathLike, weight_name: str | None = None, revision: str | None = None) -> int:
        """Load the reference LoRA, replacing one that is loaded. It acts on reference tokens only.

        Args:
            source: A .safetensors file, a folder, or a hub repository such as "ByteDance-FanQie/MOSAIC".
            weight_name: File inside the folder or repository.
            revision: Branch, tag or commit of the repository.

        Returns:
            The rank, read from the file.

        Raises:
            FileNotFoundError, OSError: If there is no such file.
            ValueError: If the file does not fit this transformer, listing missing and unexpected keys.
        """
        path = resolve_lora_file(source, weight_name, revision)
        lora.read_reference_lora(path, self.transformer)
        config = reference_metadata(LoraFile(path).metadata, str(path)).get("config", {})
        rank = lora.load_reference_lora(self.transformer, path, pipeline=self)
        self.reference_config = config
        return rank

    def save_reference_lora(self, path: str | os.PathLike) -> None:
        """Write the reference LoRA as one safetensors file with the published keys.

        Raises:
            ValueError: If no reference LoRA is loaded.
        """
        lora.save_reference_lora(self.transformer, path, self.reference_config)

    def unload_reference_lora(self) -> None:
        """Remove the reference LoRA; style LoRAs stay."""
        lora.detach_reference_lora(self.transformer)
        self.reference_config = {}

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, Tensor], adapter_name: str | None = None, **kwargs: Any
    ) -> None:
        """Load a style LoRA, with diffusers' meaning: it acts on text and target, never on references.

        Raises:
            ValueError: If the file is a reference LoRA (on every token it would give plausible but wrong pictures), or the adapter's
                name is that of the reference LoRA.
        """
        if adapter_name == lora.ADAPTER_NAME:
            raise ValueError(f"adapter_name {adapter_name!r} is taken by the reference LoRA; give the style LoRA another name.")
        source = pretrained_model_name_or_path_or_dict
        state_dict = self.lora_state_dict(source.copy() if isinstance(source, dict) else source, **kwargs)
        if any(".lokr_" in key for key in state_dict):
            raise ValueError("LoKr adapters would act on reference tokens too; only LoRA files can be loaded beside a reference branch.")
        modules = {key.removeprefix(lora.PREFIX).split(".lora_")[0] for key in state_dict if key.startswith(lora.PREFIX)}
        if modules == set(lora.reference_lora_modules(self.transformer)) or _carries_reference_metadata(source, kwargs.get("weight_name")):
            name = "the given state dict" if isinstance(source, dict) else repr(str(source))
            raise ValueError(f"{name} is a reference LoRA, not a style LoRA: load it with load_reference_lora().")
        super().load_lora_weights(source, adapter_name=adapter_name, **kwargs)

    def unload_lora_weights(self, **kwargs: Any) -> None:
        """Remove all style LoRAs; the reference LoRA stays (see `unload_reference_lora`)."""
        if not lora.has_reference_lora(self.transformer):
            super().unload_lora_weights(**kwargs)
            return
        styles = [name for name in self.transformer.peft_config if name != lora.ADAPTER_NAME]
        if styles:
            lora.delete_adapters(self.transformer, styles)
        if self.text_encoder is not None:
            _remove_text_encoder_monkey_patch(self.text_encoder)

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, but refused while a reference LoRA is loaded: fused weights would reach the reference tokens.

        Raises:
            ValueError: If a reference LoRA is loaded.
        """
        if lora.has_reference_lora(self.transformer):
            raise ValueError(
                "fuse_lora() would apply style LoRAs to reference tokens too; leave them unfused, or unload_reference_lora() first."
            )
        super().fuse_lora(*args, **kwargs)


def _carries_reference_metadata(source: str | os.PathLike | dict[str, Tensor], weight_name: str | None) -> bool:
    if isinstance(source, dict):
        return False
    path = os.path.join(source, weight_name) if weight_name else os.fspath(source)
    return os.path.isfile(path) and path.endswith(".safetensors") and bool(reference_metadata(LoraFile(path).metadata, path))
