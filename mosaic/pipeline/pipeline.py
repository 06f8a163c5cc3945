"""`MosaicFluxPipeline`: prompt + reference pictures -> picture, as a diffusers pipeline.

The FLUX sampler of diffusers with the reference branch inside; every habit of `FluxPipeline` (loading, offloading, callbacks,
style LoRAs) is inherited.
"""

import functools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from mosaic.lora import adapter as lora
from mosaic.method.tokens import Grid, pack_latents, position_ids, reference_position_ids, token_grid, unpack_latents
from mosaic.model.attention_rows import CaptureRequest
from mosaic.model.reference_cache import CachedTransformer, refresh_interval
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from mosaic.pipeline.attention_report import AttentionRecorder, PictureAttention, subject_tokens
from mosaic.pipeline.encoders import Encoders, LiveEncoders, PromptEmbeddings
from mosaic.pipeline.inputs import (
    PipelineInputs,
    Reference,
    check_inputs,
    check_numbers,
    check_sampling,
    group_by_num_references,
    prepared_references,
)
from mosaic.pipeline.latents import decode_latents
from mosaic.pipeline.lora_loading import ReferenceLoraLoaderMixin
from mosaic.weights.hub import require_model_name, unreachable_message

DEFAULT_SIZE = 512  # px; target and references, unless the loaded reference LoRA says otherwise
References = Sequence[Reference]  # of one prompt
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


@dataclass
class _Group:
    """Pictures that share K and run as one batch; all tensors lead with the batch dimension."""

    latents: Tensor
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    reference_latents: Tensor | None  # packed [B, K, N_ref, C]
    reference_grid: Grid | None
    reference_strength: Tensor | None  # [B, K]


class MosaicFluxPipeline(ReferenceLoraLoaderMixin, FluxPipeline):
    """Text and reference pictures to picture. Load with `from_pretrained`, then `load_reference_lora`."""

    @functools.wraps(FluxPipeline.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.encoders: Encoders = LiveEncoders(self)
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
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (OSError, SafetensorError) as error:
            raise OSError(unreachable_message(str(pretrained_model_name_or_path), error)) from error

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
        reference_strength: float | Sequence[float] | Sequence[Sequence[float]] | None = None,
        reference_cache: bool = False,
        refresh_references: int | None = None,
        max_sequence_length: int | None = None,
        output_type: str = "pil",
        output_attention: bool = False,
        callback_on_step_end: Callable[["MosaicFluxPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> MosaicPipelineOutput:
        """Generate pictures.

        Args:
            prompt: One prompt or a list.
            reference_images: For one prompt its pictures; for a list of prompts one list each (they may differ in K, and be
                empty). Each is prepared as by `prepare_reference`, unless it is a `PreparedReference` already.
            height: In px, a multiple of the token size. None: as the reference LoRA was trained, else 512.
            width: Likewise.
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
        image_size = self._trained("data", "image_size") or (DEFAULT_SIZE, DEFAULT_SIZE)
        height, width = (given if given is not None else usual for given, usual in zip((height, width), image_size, strict=True))
        grid = token_grid(height, width, self.encoders.vae_scale_factor)
        if reference_size is None:
            reference_size = self._trained("data", "reference_size") or DEFAULT_SIZE
        token_grid(reference_size, reference_size, self.encoders.vae_scale_factor, where="reference_size")
        attention_mode = reference_attention or self._trained("model", "reference_attention") or "target"
        check_sampling(inputs, num_inference_steps, attention_mode, output_type, grid, self.transformer.config.in_channels)
        check_numbers(guidance_scale=guidance_scale, image_guidance_scale=image_guidance_scale)
        interval = refresh_interval(reference_cache, refresh_references, attention_mode)
        self._guidance_scale, self._image_guidance_scale = guidance_scale, image_guidance_scale
        self._interrupt, self._current_timestep = False, None

        prepared = prepared_references(inputs.reference_images, reference_size, reference_scale)
        prompt_embeds, pooled_prompt_embeds = self._encode_prompts(inputs, max_sequence_length)
        references = self._reference_latents(inputs, prepared)
        subjects = self._subjects(references, prepared) if output_attention else None
        latents = self._start_noise(inputs, grid, prompt_embeds.dtype)
        results: list[Tensor] = [None] * len(latents)
        attention: list[PictureAttention | None] = [None] * len(latents)
        for prompts in group_by_num_references(references):
            pictures = [p * num_images_per_prompt + i for p in prompts for i in range(num_images_per_prompt)]
            repeated = [p for p in prompts for _ in range(num_images_per_prompt)]
            group = _Group(latents[pictures], prompt_embeds[repeated], pooled_prompt_embeds[repeated], None, None, None)
            recorder = None
            if references[prompts[0]] is not None:
                stacked = torch.stack([references[p] for p in repeated])  # (B, K, C, h, w)
                group.reference_grid = Grid(stacked.shape[-2] // 2, stacked.shape[-1] // 2)
                group.reference_latents = pack_latents(stacked.flatten(0, 1)).unflatten(0, stacked.shape[:2]).to(group.latents)
                strengths = [inputs.reference_strengths[p] for p in repeated]
                if any(strength != 1 for row in strengths for strength in row):
                    group.reference_strength = torch.tensor(strengths, device=latents.device)
                recorder = AttentionRecorder([subjects[p] for p in repeated]) if output_attention else None
            self._denoise(
                group,
                grid,
                num_inference_steps,
                attention_mode,
                interval,
                recorder,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
            )
            recorded = recorder.results(group.reference_grid, grid) if recorder is not None else [None] * len(pictures)
            for row, picture in enumerate(pictures):
                results[picture] = group.latents[row]
                attention[picture] = recorded[row]
        images = torch.stack(results)
        if output_type != "latent":
            images = decode_latents(self.vae, unpack_latents(images, grid))
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return MosaicPipelineOutput(images=images, attention=attention if output_attention else None)

    def _trained(self, section: str, key: str) -> Any:
        """A setting that the loaded reference LoRA was trained with, or None."""
        return self.reference_config.get(section, {}).get(key)

    def _encode_prompts(self, inputs: PipelineInputs, max_sequence_length: int | None) -> PromptEmbeddings:
        """[B, T, d] and [B, d_pooled], one row per prompt, on the device."""
        found = inputs.prompt_embeddings
        if found is None:
            if max_sequence_length is None:
                max_sequence_length = min(512, getattr(self.tokenizer_2, "model_max_length", 512))
            found = self.encoders.encode_prompts(inputs.prompts, max_sequence_length)
        return PromptEmbeddings(*(part.to(self._execution_device) for part in found))

    def _reference_latents(self, inputs: PipelineInputs, prepared: list[list[Image.Image]]) -> list[Tensor | None]:
        """Per prompt [K, C, h, w] latents (posterior mode, shifted and scaled), or None without references."""
        if inputs.reference_latents is not None:
            return [x.to(self._execution_device) if x is not None and len(x) else None for x in inputs.reference_latents]
        return self.encoders.encode_references(prepared)

    @staticmethod
    def _subjects(references: list[Tensor | None], prepared: list[list[Image.Image]]) -> list[Tensor | None]:
        """Per prompt bool [K, N_ref], the tokens that the subjects cover: all where latents were given. None without references."""
        subjects: list[Tensor | None] = []
        for latents, pictures in zip(references, prepared, strict=True):
            if latents is None:
                subjects.append(None)
                continue
            grid = Grid(latents.shape[-2] // 2, latents.shape[-1] // 2)
            every = torch.ones(len(latents), grid.num_tokens, dtype=torch.bool)
            found = torch.stack([subject_tokens(picture, grid) for picture in pictures]) if pictures else every
            subjects.append(found.to(latents.device))
        return subjects

    def _start_noise(self, inputs: PipelineInputs, grid: Grid, dtype: torch.dtype) -> Tensor:
        """Packed noise [B * num_images_per_prompt, N, C], drawn for all pictures at once, whatever their groups."""
        channels = self.transformer.config.in_channels // 4
        if inputs.latents is None:
            shape = (inputs.num_pictures, channels, grid.rows * 2, grid.columns * 2)
            noise = pack_latents(randn_tensor(shape, generator=inputs.generator, device=torch.device("cpu"), dtype=dtype))
        else:
            noise = inputs.latents
        return noise.to(self._execution_device, dtype)

    def _denoise(
        self,
        group: _Group,
        grid: Grid,
        num_inference_steps: int,
        reference_attention: str,
        interval: float,
        recorder: AttentionRecorder | None,
        callback: Callable[["MosaicFluxPipeline", int, int, dict], dict] | None,
        callback_tensors: Sequence[str],
    ) -> None:
        """Run the sampler on `group.latents` in place; where there is a recorder, it gets the attention of every step."""
        device, batch = group.latents.device, len(group.latents)
        timesteps = self._timesteps(grid.num_tokens, num_inference_steps, device)
        guidance = torch.full([batch], self._guidance_scale, device=device) if self.transformer.config.guidance_embeds else None
        text_ids = torch.zeros(group.prompt_embeds.shape[1], 3, device=device)
        references: dict[str, Any] = {}
        if group.reference_latents is not None:
            num_references = group.reference_latents.shape[1]
            references["reference_hidden_states"] = group.reference_latents
            references["reference_ids"] = reference_position_ids(group.reference_grid, num_references, device)
            references["reference_attention"] = reference_attention
            references["reference_strength"] = group.reference_strength
            if recorder is not None:
                every_token = torch.arange(num_references * group.reference_grid.num_tokens, device=device)
                references["capture"] = CaptureRequest(every_token.expand(batch, -1))
        absent = {"reference_hidden_states": torch.zeros_like(group.reference_latents), "capture": None} if references else {}
        with_references = CachedTransformer(self.transformer, references, interval)
        without_references = CachedTransformer(self.transformer, references | absent, interval)
        self._forget_steps()
        with self.progress_bar(total=num_inference_steps) as progress:
            for step, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                arguments = {
                    "hidden_states": group.latents,
                    "timestep": t.expand(batch).to(group.latents.dtype) / 1000,
                    "guidance": guidance,
                    "pooled_projections": group.pooled_prompt_embeds,
                    "encoder_hidden_states": group.prompt_embeds,
                    "txt_ids": text_ids,
                    "img_ids": position_ids(grid, device=device),
                }
                with self._step_cache("with references"):
                    output = with_references(step, **arguments)
                velocity = output.sample
                if references and self._image_guidance_scale != 1:
                    with self._step_cache("without references"):
                        without = without_references(step, **arguments).sample
                    velocity = without + self._image_guidance_scale * (velocity - without)
                group.latents = self.scheduler.step(velocity, t, group.latents, return_dict=False)[0]
                if recorder is not None:
                    recorder.add(output.attention_rows)
                if callback is not None:
                    changed = callback(self, step, t, {name: getattr(group, name) for name in callback_tensors}) or {}
                    for name in set(changed) & set(self._callback_tensor_inputs):
                        setattr(group, name, changed[name])
                progress.update()
        self._current_timestep = None

    def _step_cache(self, name: str) -> AbstractContextManager[None]:
        """Context of one of a step's passes: a step cache of the transformer, if it has one, remembers each apart."""
        return self.transformer.cache_context(name) if self.transformer.is_cache_enabled else nullcontext()

    def _forget_steps(self) -> None:
        """Make a step cache forget an earlier run, which may have ended halfway."""
        if self.transformer.is_cache_enabled:
            self.transformer._reset_stateful_cache()

    def _timesteps(self, num_tokens: int, num_inference_steps: int, device: torch.device) -> Tensor:
        """Timesteps of FLUX: sigmas linspace(1, 1/steps) through the resolution shift."""
        config = self.scheduler.config
        mu = calculate_shift(num_tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        timesteps, _ = retrieve_timesteps(self.scheduler, num_inference_steps, device, sigmas=sigmas, mu=mu)
        self.scheduler.set_begin_index(0)
        self._num_timesteps = len(timesteps)
        return timesteps
