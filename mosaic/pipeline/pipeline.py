"""`MosaicFluxPipeline`: prompt + reference pictures -> picture, as a diffusers pipeline.

The FLUX sampler of diffusers with the reference branch inside; every habit of `FluxPipeline` (loading, offloading, callbacks,
style LoRAs) is inherited.
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from mosaic.lora import adapter as lora
from mosaic.method.grids import Grid
from mosaic.method.tokens import pack_latents, unpack_latents
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from mosaic.pipeline.attention_report import PictureAttention
from mosaic.pipeline.conditions import Conditions
from mosaic.pipeline.encoders import Encoders, LiveEncoders, PromptEmbeddings
from mosaic.pipeline.flux import FluxPipeline
from mosaic.pipeline.inputs import PipelineInputs, Reference, check_inputs, check_sampling, prepared_references, target_grid
from mosaic.pipeline.latents import decode_latents
from mosaic.pipeline.lora_loading import ReferenceLoraLoaderMixin
from mosaic.pipeline.options import ResolvedOptions, SamplingOptions
from mosaic.pipeline.sampler import Group, denoise
from mosaic.weights.hub import loading, require_model_name

References = Sequence[Reference]  # of one prompt
Callback = Callable[["MosaicFluxPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}  # of `model.dtype`


@dataclass
class MosaicPipelineOutput(BaseOutput):
    """Output of `MosaicFluxPipeline`.

    Attributes:
        images: One picture per prompt and image, prompts first; PIL, numpy or torch by `output_type`.
        attention: With `output_attention=True` one `PictureAttention` per picture (maps, entropy over the steps, leakage, peaks), None
            for a picture without references or stopped before its first step. Otherwise None.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    attention: list[PictureAttention | None] | None = None


signature_of_stock: Any = functools.wraps(FluxPipeline.__init__)  # from which diffusers reads the names of the components


class MosaicFluxPipeline(ReferenceLoraLoaderMixin, FluxPipeline):
    """Text and reference pictures to picture. Load with `from_pretrained`, then `load_reference_lora`."""

    transformer: MosaicFluxTransformer2DModel

    @signature_of_stock
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.encoders: Encoders = LiveEncoders(self, warns=True)
        self.reference_config: dict[str, Any] = {}  # the resolved training config that a reference LoRA file carries

    def register_modules(self, **modules: Any) -> None:
        """As in diffusers; a transformer gets its reference branch, and is written as the stock class, so that diffusers can load it."""
        super().register_modules(**modules)
        if modules.get("transformer") is not None:
            MosaicFluxTransformer2DModel.adopt(self.transformer)
            self.register_to_config(transformer=("diffusers", FluxTransformer2DModel.__name__))

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple]:
        types = super()._get_signature_types()
        return types | {"transformer": (*types["transformer"], MosaicFluxTransformer2DModel)}  # what `from_pipe` takes over

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write the base as a diffusers folder; see `DiffusionPipeline.save_pretrained`.

        Raises:
            ValueError: If a LoRA is loaded: its layers would be written in place of the base's.
        """
        if getattr(self.transformer, "peft_config", None):
            raise ValueError(
                f"save_pretrained() writes the base, but the LoRAs {', '.join(self.transformer.peft_config)} are loaded. Write the "
                "reference LoRA with save_reference_lora(), then unload_reference_lora() and unload_lora_weights()."
            )
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "MosaicFluxPipeline":
        """Load any diffusers FLUX folder or repository; see `DiffusionPipeline.from_pretrained`.

        Raises:
            FileNotFoundError: If it is neither a folder nor of a hub id's form.
            OSError: If the id is gated, missing or unreachable, or the folder damaged; the message says what to do.
        """
        require_model_name(pretrained_model_name_or_path)
        with loading(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        reference_images: References | Sequence[References] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.5,
        image_guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        reference_latents: Tensor | Sequence[Tensor] | None = None,
        reference_size: int | None = None,
        reference_scale: float = 0.9,
        reference_attention: str | None = None,
        reference_position: str | None = None,
        reference_strength: float | Sequence[float] | Sequence[Sequence[float]] | None = None,
        reference_cache: bool = False,
        refresh_references: int | None = None,
        max_sequence_length: int | None = None,
        output_type: str = "pil",
        output_attention: bool = False,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> MosaicPipelineOutput:
        """Generate pictures.

        Args:
            prompt: One prompt or a list.
            reference_images: For one prompt its pictures; for a list of prompts one list each (they may differ in K, and be
                empty). Each is prepared as by `prepare_reference`, unless it is a `PreparedReference` already.
            height: In px, a multiple of the token size. None: as the reference LoRA was trained, else 512.
            width: In px, a multiple of the token size. None: as the reference LoRA was trained, else 512.
            num_inference_steps: Sampling steps.
            guidance_scale: Embedded guidance of the target; without effect on models that have no guidance embedding.
            image_guidance_scale: How far the velocity goes from that with zero latents in the references' place (0) to that with the
                references (1) and beyond, which brings out the references' looks. Other values than 1 take two passes per step.
            num_images_per_prompt: Pictures per prompt.
            generator: One CPU generator, or one per picture. Start noise is drawn on the CPU, so that it is the same on every machine.
            latents: Start noise, packed [B * num_images_per_prompt, N, C], instead of drawing it.
            prompt_embeds: [B, T, d], instead of `prompt`; with `pooled_prompt_embeds`.
            pooled_prompt_embeds: [B, d_pooled].
            reference_latents: Per prompt a tensor [K, C, h, w] of VAE latents, shifted and scaled, instead of `reference_images`.
            reference_size: Side of the references in px. None: as trained, else 512.
            reference_scale: Share of that side that the subject's long side takes.
            reference_attention: "target", "joint" or "isolated". None: as trained, else "target".
            reference_position: "width" or "index". None: as trained, else "width".
            reference_strength: How strongly references are attended to: for all one number, or for one prompt one per reference, or for a
                list of prompts one list each. Its logarithm is added to the logits of the reference's keys, so that 1 changes nothing and
                0 hides the reference. None: 1.
            reference_cache: Compute the references at the first step only and keep their keys and values for the others: 0.67 GiB per
                512 px reference and picture with FLUX.1-dev, half as much again with `output_attention`, and the same for the second
                pass of `image_guidance_scale`. Exact; only for isolated references.
            refresh_references: The same for the other modes: compute the references every so many steps. An approximation, except for 1.
            max_sequence_length: T5 tokens. None: as many as the tokenizer allows, at most 512.
            output_type: "pil", "np", "pt" or "latent" (packed [B, N, C]).
            output_attention: Whether to return where the references look: `MosaicPipelineOutput.attention`. Costs the memory of one float32
                map [K * N_ref, N_tgt] per picture, whatever the number of steps.
            callback_on_step_end: Called as f(pipeline, step, timestep, tensors) and may return changed tensors. Prompts of different K run
                one after the other, each group from step 0 with its own part of the tensors.
            callback_on_step_end_tensor_inputs: Names of the tensors that the callback gets.

        Raises:
            ValueError: If arguments do not fit each other, before anything is computed.
        """
        options = SamplingOptions(
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            reference_size=reference_size,
            reference_scale=reference_scale,
            reference_attention=reference_attention,
            reference_position=reference_position,
            reference_cache=reference_cache,
            refresh_references=refresh_references,
            max_sequence_length=max_sequence_length,
        ).trained(self.reference_config)
        inputs = check_inputs(
            prompt=prompt,
            reference_images=reference_images,
            latents=latents,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            reference_latents=reference_latents,
            reference_strength=reference_strength,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            has_reference_lora=lora.has_reference_lora(self.transformer),
            callback_tensors=callback_on_step_end_tensor_inputs,
            allowed_callback_tensors=self._callback_tensor_inputs,
        )
        grid = target_grid(options, self.encoders.vae_scale_factor)
        check_sampling(inputs, options, output_type, grid, self.transformer.config.in_channels)
        self._guidance_scale, self._interrupt, self._current_timestep = options.guidance_scale, False, None

        conditions = self._encode(inputs, options)
        noise = self._start_noise(inputs, grid, conditions.text.prompt_embeds.dtype)
        found = [noise[0]] * len(noise)
        attention: list[PictureAttention | None] = [None] * len(noise)
        for pictures in conditions.groups(num_images_per_prompt):
            group = conditions.group(pictures, num_images_per_prompt, noise, grid, output_attention)
            denoise(self, group, options, self._after_step(group, callback_on_step_end, callback_on_step_end_tensor_inputs))
            for picture, sampled, recorded in zip(pictures, group.latents, group.attention(), strict=True):
                found[picture], attention[picture] = sampled, recorded
        images = self._decode(torch.stack(found), grid, output_type)
        self.maybe_free_model_hooks()
        return MosaicPipelineOutput(images=images, attention=attention if output_attention else None)

    def _encode(self, inputs: PipelineInputs, options: ResolvedOptions) -> Conditions:
        """Prompts and references as the transformer reads them, on the device."""
        device, text = self._execution_device, inputs.text
        prepared = prepared_references(inputs.reference_images, options.reference_size, options.reference_scale)
        if not isinstance(text, PromptEmbeddings):
            length = options.max_sequence_length
            if length is None:
                length = min(512, getattr(self.tokenizer_2, "model_max_length", 512))
            text = self.encoders.encode_prompts(text, length)
        if inputs.reference_latents is None:
            references = self.encoders.encode_references(prepared)
        else:
            references = [x.to(device) if x is not None and len(x) else None for x in inputs.reference_latents]
        return Conditions(PromptEmbeddings(*(part.to(device) for part in text)), references, prepared, inputs.reference_strengths)

    def _start_noise(self, inputs: PipelineInputs, grid: Grid, dtype: torch.dtype) -> Tensor:
        """Packed noise [B * num_images_per_prompt, N, C], drawn for all pictures at once, whatever their groups."""
        channels = self.transformer.config.in_channels // 4
        if inputs.latents is None:
            shape = (inputs.num_pictures, channels, grid.rows * 2, grid.columns * 2)
            noise = pack_latents(randn_tensor(shape, generator=inputs.generator, device=torch.device("cpu"), dtype=dtype))
        else:
            noise = inputs.latents
        return noise.to(self._execution_device, dtype)

    def _after_step(self, group: Group, callback: Callback | None, names: Sequence[str]) -> Callable[[int, Tensor], None]:
        """What calls the callback after a step with tensors of the group, and takes over those that it changed."""
        if callback is None:
            return lambda *_: None

        def after_step(step: int, timestep: Tensor) -> None:
            changed = callback(self, step, timestep, {name: getattr(group, name) for name in names}) or {}
            for name in set(changed) & set(self._callback_tensor_inputs):
                setattr(group, name, changed[name])

        return after_step

    def _decode(self, latents: Tensor, grid: Grid, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
        """Packed latents [B, N, C] as pictures, or as they are."""
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(decode_latents(self.vae, unpack_latents(latents, grid)), output_type=output_type)
