"""Presets that fit rendering to a device (`inference.memory`), each a choice among the means of diffusers and transformers.

In all of them the reference LoRA is exact and acts on reference tokens only, whatever the format of the layer below it.
"""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mosaic.config.loading import Config
from mosaic.config.schema import FieldError
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.weights.quantization import PACKAGES, check_quantization, require_package

GGUF = "gguf"
FORMAT_NAMES = {"none": "full precision", GGUF: "GGUF file"}


@dataclass(frozen=True)
class MemoryPreset:
    """What a preset does.

    Attributes:
        name: Its value of `inference.memory`.
        transformer: Format of the transformer's matrices: "none" (as `model.dtype`), "int8", "nf4", "fp8", "fp8_dynamic" or "gguf".
        text_encoder_2: Format of T5's matrices: "none" or "int8".
        encoders_leave: All prompts are encoded before the first picture, then the text encoders leave the memory.
        group_offload: The transformer's blocks wait in the CPU's memory; the next one comes while one computes.
        vae_tiling: The VAE works on one picture at a time, and on one part of it at a time where it is larger than the VAE was made for.
    """

    name: str
    transformer: str = "none"
    text_encoder_2: str = "none"
    encoders_leave: bool = False
    group_offload: bool = False
    vae_tiling: bool = False

    @property
    def packages(self) -> list[str]:
        """The optional packages that it needs."""
        formats = {self.transformer, self.text_encoder_2} - {"none"}
        return sorted({GGUF if name == GGUF else PACKAGES[name] for name in formats})

    def describe(self) -> str:
        """What it does, in a few words."""
        transformer, t5 = (FORMAT_NAMES.get(name, name) for name in (self.transformer, self.text_encoder_2))
        words = [f"transformer in {transformer}" + (", block by block from CPU memory" if self.group_offload else "")]
        words.append(f"T5 in {t5}" + (", gone once the prompts are encoded" if self.encoders_leave else ""))
        return ", ".join(words + ["VAE in tiles"] * self.vae_tiling)


#: From the fastest to the one that needs least. Errors of one velocity of the pocket model: int8 1 %, fp8 3 %, nf4 11 %.
PRESETS = {
    preset.name: preset
    for preset in (
        MemoryPreset("80gb"),
        MemoryPreset("48gb", encoders_leave=True),
        MemoryPreset("24gb", transformer="int8", encoders_leave=True),
        MemoryPreset("16gb", transformer="nf4", encoders_leave=True, vae_tiling=True),
        MemoryPreset("12gb", transformer="int8", text_encoder_2="int8", encoders_leave=True, group_offload=True, vae_tiling=True),
    )
}
PLAIN = MemoryPreset("none")


def missing_packages(preset: MemoryPreset) -> list[str]:
    """The optional packages that a preset needs and that are not installed."""
    return [package for package in preset.packages if importlib.util.find_spec(package) is None]


def resolve_preset(config: Config) -> MemoryPreset:
    """The preset that `inference.memory` names, with the transformer's format that `inference.quantization` or `inference.gguf` ask for.

    Raises:
        ValueError: If two settings exclude each other, or a package is missing.
    """
    settings = config.inference
    if settings.memory == "auto":
        raise ValueError('inference.memory "auto" must be made a preset by mosaic.planning.memory_choice.auto_config first.')
    preset = with_format(PRESETS.get(settings.memory, PLAIN), config)
    for quantization in (preset.transformer, preset.text_encoder_2):
        if quantization == GGUF:
            require_package(GGUF, "inference.gguf")
        elif quantization != "none":
            check_quantization(quantization, f'inference.memory "{settings.memory}":')
    return preset


def with_format(preset: MemoryPreset, config: Config) -> MemoryPreset:
    """The preset with the transformer's format that the settings ask for beside it.

    Raises:
        ValueError: If they ask for two, or for one that cannot be moved block by block.
    """
    settings = config.inference
    if settings.gguf is not None and settings.quantization is not None:
        raise FieldError("inference.quantization", f"must be null where inference.gguf names the weights, got {settings.quantization!r}")
    asked = GGUF if settings.gguf is not None else settings.quantization
    preset = preset if asked is None else replace(preset, transformer=asked)
    if preset.group_offload and preset.transformer == "nf4":
        raise FieldError("inference.quantization", f'nf4 cannot be moved block by block as inference.memory "{preset.name}" does; use int8')
    return preset


def gguf_file(name: str) -> Path:
    """The file that `inference.gguf` names.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If its name does not say that it is one.
    """
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"inference.gguf: file not found: {path}.")
    if path.suffix.lower() != ".gguf":  # by which diffusers tells the kinds of files apart
        raise ValueError(f"inference.gguf must be a file *.gguf, got {path}.")
    return path


def place_pipeline(pipeline: MosaicFluxPipeline, preset: MemoryPreset, device: torch.device) -> None:
    """Bring a loaded pipeline, all its adapters included, to its device as the preset says."""
    if preset.vae_tiling:
        pipeline.vae.enable_tiling()
        pipeline.vae.enable_slicing()
    if preset.group_offload:
        streams = device.type == "cuda"
        pipeline.transformer.enable_group_offload(device, torch.device("cpu"), "block_level", num_blocks_per_group=1, use_stream=streams)
        for name, model in pipeline.components.items():
            if name != "transformer" and isinstance(model, torch.nn.Module):
                model.to(device)
    elif device.type != "cpu":
        pipeline.to(device)
