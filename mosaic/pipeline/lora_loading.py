"""Loading LoRAs into the pipeline: the reference LoRA, and diffusers' style LoRAs beside it."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.loaders.lora_base import _remove_text_encoder_monkey_patch
from diffusers.utils import logging
from torch import Tensor

from mosaic.lora import adapter as lora
from mosaic.lora.files import LoraFile, reference_metadata
from mosaic.lora.formats import to_diffusers
from mosaic.lora.loading import in_dtype_of, load_reference_lora
from mosaic.method.tokens import REFERENCE_POSITIONS
from mosaic.model.attention import REFERENCE_ATTENTION_MODES
from mosaic.weights.float8 import Float8Linear
from mosaic.weights.hub import STYLE_WEIGHT_NAME, resolve_lora_file, resolve_style_lora_file

#: What keys of other kinds of adapters contain, and why these cannot be loaded.
NO_LORA = {
    (".lokr_",): "LoKr adapters would act on reference tokens too",
    ("lora_magnitude_vector", "dora_scale"): "DoRA adapters rescale the base weights of all tokens",
}


class ReferenceLoraLoaderMixin(FluxLoraLoaderMixin):
    """The pipeline's methods for LoRAs; those of diffusers are guarded."""

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
            ValueError: If the file does not fit this transformer, listing missing and unexpected keys; if the config in its metadata is
                damaged; if a style LoRA is fused.
        """
        if self.num_fused_loras:
            raise ValueError("a style LoRA is fused and would reach the reference tokens too: unfuse_lora(), or load the base anew.")
        file = LoraFile(resolve_lora_file(source, weight_name, revision), "reference LoRA")
        config = trained_config(file)
        rank = load_reference_lora(self.transformer, file, pipeline=self)
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
        for marks, what in NO_LORA.items():
            if any(mark in key for key in state_dict for mark in marks):
                raise ValueError(f"{what}; only LoRA files can be loaded beside a reference branch.")
        modules = {key.removeprefix(lora.PREFIX).split(".lora_")[0] for key in state_dict if key.startswith(lora.PREFIX)}
        if modules == set(lora.reference_lora_modules(self.transformer)) or _carries_reference_metadata(source, kwargs.get("weight_name")):
            name = "the given state dict" if isinstance(source, dict) else repr(str(source))
            raise ValueError(f"{name} is a reference LoRA, not a style LoRA: load it with load_reference_lora().")
        super().load_lora_weights(source, adapter_name=adapter_name, **kwargs)

    def load_style_lora(
        self, source: str | os.PathLike, weight_name: str | None = None, scale: float = 1.0, adapter_name: str = "style"
    ) -> None:
        """Load a style LoRA for the transformer and make it the active one: as `load_lora_weights`, but every key must fit.

        It acts on text and target, never on references. `set_adapters` brings several together; `unload_lora_weights` removes them.

        Args:
            source: A .safetensors file with the keys of diffusers, kohya or ComfyUI, a folder, or a hub repository.
            weight_name: File inside the folder or repository.
            scale: Factor on it.
            adapter_name: Its name, free to choose.

        Raises:
            FileNotFoundError, OSError: If there is no such file.
            ValueError: If it is no FLUX LoRA, does not fit this transformer, is a reference LoRA, or the name is taken.
        """
        file = LoraFile(resolve_style_lora_file(source, weight_name), "style LoRA")
        where = str(file.path)
        tensors = to_diffusers(file)
        if reference_metadata(file.metadata, where):
            raise ValueError(f"{where!r} is a reference LoRA, not a style LoRA: load it with load_reference_lora().")
        check_style_lora(tensors, self.transformer, where)
        tensors = in_dtype_of(self.transformer, tensors, f"style LoRA {where}")
        with _quiet():
            self.load_lora_weights(tensors, adapter_name=adapter_name)
        self.set_adapters(adapter_name, scale)

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
            ValueError: If a reference LoRA is loaded, or the weights are in 8 bits of our own.
        """
        if lora.has_reference_lora(self.transformer):
            raise ValueError(
                "fuse_lora() would apply style LoRAs to reference tokens too; leave them unfused, or unload_reference_lora() first."
            )
        if any(isinstance(layer, Float8Linear) for layer in self.transformer.modules()):
            raise ValueError(
                "fuse_lora() cannot add to weights in fp8_dynamic: what it adds would be rounded with them; leave LoRAs unfused."
            )
        super().fuse_lora(*args, **kwargs)


def check_style_lora(tensors: Mapping[str, Tensor], transformer: FluxTransformer2DModel, where: str) -> None:
    """Check modules and shapes of a style LoRA, keys as of `to_diffusers`, against a transformer.

    Raises:
        ValueError: If it has modules that the transformer lacks, or a shape does not fit.
    """
    names = sorted(key.removeprefix(lora.PREFIX).removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight"))
    present = {name for name, module in transformer.named_modules() if hasattr(module, "in_features")}
    unexpected = [name for name in names if name not in present]
    if unexpected:
        raise ValueError(
            f"{where}: {len(unexpected)} of its {len(names)} modules are not in this transformer: {lora.shorten(unexpected)}. "
            "Is it for another base model?"
        )
    for name in names:
        layer = transformer.get_submodule(name)
        found = (tensors[f"{lora.PREFIX}{name}.lora_A.weight"].shape[1], len(tensors[f"{lora.PREFIX}{name}.lora_B.weight"]))
        if found != (layer.in_features, layer.out_features):
            wanted = f"{layer.in_features} inputs and {layer.out_features} outputs"
            raise ValueError(f"{where}: {name} must have {wanted}, got {found[0]} and {found[1]}. Is it for another base model?")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without remarks of diffusers and PEFT that checked keys make pointless: no text encoder, names of equal ends, a second adapter."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "While injecting the PEFT adapters, an inconsistency", RuntimeWarning)
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute in the model", UserWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)


def _carries_reference_metadata(source: str | os.PathLike | dict[str, Tensor], weight_name: str | None) -> bool:
    if isinstance(source, dict):
        return False
    path = Path(source, weight_name) if weight_name else Path(source)
    if path.is_dir():  # diffusers takes the one that has its own name, or the only one
        files = sorted(path.glob("*.safetensors"))
        path = next((file for file in files if file.name == STYLE_WEIGHT_NAME or len(files) == 1), path)
    return path.is_file() and path.suffix == ".safetensors" and bool(reference_metadata(LoraFile(path).metadata, str(path)))


def trained_config(file: LoraFile) -> dict[str, Any]:
    """The resolved training config of a reference LoRA's file, empty without one; what the pipeline takes from it is checked.

    Raises:
        ValueError: If a setting is not what it must be.
    """
    config = reference_metadata(file.metadata, str(file.path)).get("config", {})
    for section, key, wanted, fits in (
        ("data", "image_size", "two sizes in px", lambda x: isinstance(x, list) and len(x) == 2 and all(map(_is_size, x))),
        ("data", "reference_size", "a size in px", _is_size),
        ("model", "reference_attention", f"one of {REFERENCE_ATTENTION_MODES}", lambda x: x in REFERENCE_ATTENTION_MODES),
        ("model", "reference_position", f"one of {REFERENCE_POSITIONS}", lambda x: x in REFERENCE_POSITIONS),
    ):
        settings = config.get(section, {})
        if not isinstance(settings, dict):
            raise ValueError(f"{file.path}: {section} of the config in its metadata must be an object, got {settings!r}.")
        if (value := settings.get(key)) is not None and not fits(value):
            raise ValueError(f"{file.path}: {section}.{key} of the config in its metadata must be {wanted}, got {value!r}.")
    return config


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
