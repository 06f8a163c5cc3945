"""The pipeline that renders cases, loaded and placed as `inference.memory` says."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig
from torch import nn
from transformers import AutoConfig, T5EncoderModel

from mosaic.config.loading import Config
from mosaic.files import in_one_line
from mosaic.pipeline.encoders import GivenPrompts, LiveEncoders, PromptEmbeddings, RememberedEncoders, encode_each
from mosaic.pipeline.pipeline import DTYPES, MosaicFluxPipeline
from mosaic.rendering.memory_presets import MemoryPreset, gguf_file, place_pipeline, resolve_preset
from mosaic.weights.components import TEXT_COMPONENTS, component_folder
from mosaic.weights.quantized_files import quantized_model


@dataclass(frozen=True)
class _Loader:
    """Loads parts of a model as the settings say."""

    config: Config
    preset: MemoryPreset
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of all weights that are not quantised: `model.dtype`."""
        return DTYPES[self.config.model.dtype]

    def pipeline(self, **parts: Any) -> MosaicFluxPipeline:
        """The pipeline with these parts given, or left out (None)."""
        pipeline = MosaicFluxPipeline.from_pretrained(self.config.model.pretrained, dtype=self.dtype, **parts)
        pipeline.encoders = LiveEncoders(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def transformer(self) -> dict[str, nn.Module]:
        """The transformer as an argument of `pipeline`, where its format is not the usual one."""
        if self.preset.transformer == "none":
            return {}
        if self.config.inference.gguf is not None:
            return {"transformer": load_gguf(self.config.inference.gguf, self.config.model.pretrained, self.dtype)}
        folder = component_folder(self.config.model.pretrained, "transformer")
        return {
            "transformer": self._quantized(
                folder,
                lambda: FluxTransformer2DModel.from_pretrained(folder, dtype=self.dtype),
                lambda: FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder)),
                self.preset.transformer,
            )
        }

    def text_encoder(self) -> dict[str, nn.Module]:
        """T5 as an argument of `pipeline`, where its format is not the usual one."""
        if self.preset.text_encoder_2 == "none":
            return {}
        folder = component_folder(self.config.model.pretrained, "text_encoder_2")
        return {
            "text_encoder_2": self._quantized(
                folder,
                lambda: T5EncoderModel.from_pretrained(folder, dtype=self.dtype),
                lambda: T5EncoderModel(AutoConfig.from_pretrained(folder)),
                self.preset.text_encoder_2,
            )
        }

    def _quantized(self, folder: Path, load: Any, build: Any, quantization: str) -> nn.Module:
        return quantized_model(folder, load, build, quantization, self.dtype, self.device, self.config.inference.quantized_cache)


def load_pipeline(config: Config, lora_file: Path | None, device: torch.device, prompts: Sequence[str] = ()) -> MosaicFluxPipeline:
    """The pipeline with its LoRAs, on its device, as `inference.memory` (not "auto") says.

    Args:
        config: The settings.
        lora_file: The reference LoRA; None: there is none.
        device: Where pictures are rendered.
        prompts: All that will be rendered; where the text encoders leave, others cannot be.

    Raises:
        FileNotFoundError, OSError, ValueError: A part cannot be loaded, or does not fit into the device's memory.
    """
    preset = resolve_preset(config)
    loader = _Loader(config, preset, device)
    with _full_memory_explained(config):
        if not preset.encoders_leave:
            pipeline = loader.pipeline(**loader.transformer(), **loader.text_encoder())
        else:
            encoded = encode_first(loader, prompts)
            pipeline = loader.pipeline(**loader.transformer(), **dict.fromkeys(TEXT_COMPONENTS))
            pipeline.encoders = GivenPrompts(pipeline.encoders, encoded)
        pipeline.encoders = RememberedEncoders(pipeline.encoders)  # neighbouring cases often share their prompt or their pictures
        if lora_file is not None:
            pipeline.load_reference_lora(lora_file)
        style = config.inference
        if style.style_lora is not None:
            pipeline.load_style_lora(style.style_lora, style.style_lora_weight_name, style.style_lora_scale)
        place_pipeline(pipeline, preset, device)
    return pipeline


@contextmanager
def _full_memory_explained(config: Config) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f'the model must fit into the device\'s memory, but it is full with inference.memory "{config.inference.memory}": '
            f"{str(error).partition('. ')[0]}. Take a smaller inference.memory or a smaller inference.quantization, or free memory."
        ) from error


def encode_first(loader: _Loader, prompts: Sequence[str]) -> dict[tuple[str, int], PromptEmbeddings]:
    """The embeddings of prompts; the text encoders are loaded for them, and gone afterwards."""
    pipeline = loader.pipeline(transformer=None, vae=None, **loader.text_encoder())
    if loader.device.type != "cpu":
        pipeline.to(loader.device)
    encoded = encode_each(pipeline.encoders, prompts, loader.config.model.text_length)
    del pipeline
    gc.collect()  # modules refer to themselves in circles, which would keep gigabytes until some later collection
    if loader.device.type == "cuda":
        torch.cuda.empty_cache()
    return encoded


def load_gguf(path: str, pretrained: str, dtype: torch.dtype) -> FluxTransformer2DModel:
    """A transformer from a GGUF file, with the config of `pretrained`; its layers stay packed and are unpacked one at a time.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or is not of this model.
    """
    file = gguf_file(path)
    folder = component_folder(pretrained, "transformer")
    try:
        return FluxTransformer2DModel.from_single_file(
            str(file), quantization_config=GGUFQuantizationConfig(compute_dtype=dtype), config=str(folder), dtype=dtype
        ).requires_grad_(False)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, IndexError) as error:
        reason = in_one_line(error, 300, with_kind=True)
        raise ValueError(f"inference.gguf: {path} cannot be read as a GGUF transformer of {pretrained} ({reason}).") from error
