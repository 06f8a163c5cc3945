"""FLUX's sampler with the reference branch inside: a group of pictures with equal K from noise to latents."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mosaic.method.grids import Grid
from mosaic.method.tokens import position_ids, reference_position_ids, text_position_ids
from mosaic.model.attention_rows import CaptureRequest
from mosaic.model.reference_cache import CachedTransformer, refresh_interval
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from mosaic.pipeline.attention_report import AttentionRecorder, PictureAttention
from mosaic.pipeline.flux import FluxPipeline, calculate_shift, retrieve_timesteps
from mosaic.pipeline.options import ResolvedOptions


@dataclass(frozen=True)
class ReferenceGroup:
    """The references of a group.

    Attributes:
        latents: [B, K, N_ref, C], packed, K at least 1.
        grid: Grid of N_ref.
        strength: [B, K], or None where all are 1.
        recorder: Gets the attention of every step; None: it is not read.
    """

    latents: Tensor
    grid: Grid
    strength: Tensor | None
    recorder: AttentionRecorder | None


@dataclass
class Group:
    """Pictures that share K and run as one batch. Callbacks may put other tensors in the place of the first three.

    Attributes:
        latents: [B, N, C], packed: noise at first, the pictures at last.
        prompt_embeds: [B, T, d].
        pooled_prompt_embeds: [B, d_pooled].
        references: None where K is 0.
        target_grid: Grid of N.
    """

    latents: Tensor
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    references: ReferenceGroup | None
    target_grid: Grid

    def attention(self) -> list[PictureAttention | None]:
        """Where the references of each picture look; None each where that was not recorded."""
        references = self.references
        if references is None or references.recorder is None:
            return [None] * len(self.latents)
        return references.recorder.results(references.grid, self.target_grid)


def denoise(pipeline: FluxPipeline, group: Group, options: ResolvedOptions, after_step: Callable[[int, Tensor], None]) -> None:
    """Run the sampler on `group.latents` in place.

    Args:
        pipeline: Gives transformer, scheduler, progress bar and the sign to stop (`interrupt`).
        group: The pictures.
        options: What the sampler is told.
        after_step: Called with step and timestep, and may change the group's tensors.
    """
    transformer, references = MosaicFluxTransformer2DModel.adopt(pipeline.transformer), group.references
    timesteps = shifted_timesteps(pipeline, group.target_grid.num_tokens, options.num_inference_steps, group.latents.device)
    velocities = Velocities(transformer, group, options)
    with pipeline.progress_bar(total=len(timesteps)) as progress:
        for step, t in enumerate(timesteps):
            if pipeline.interrupt:
                # diffusers stops so: the loop runs out without a step, and what was reached is decoded.
                continue
            pipeline._current_timestep = t
            velocity, attention_rows = velocities(step, t)
            group.latents = pipeline.scheduler.step(velocity, t, group.latents, return_dict=False)[0]
            if references is not None and references.recorder is not None:
                assert attention_rows is not None, "rows were asked for"
                references.recorder.add(attention_rows)
            after_step(step, t)
            progress.update()
    pipeline._current_timestep = None


def shifted_timesteps(pipeline: FluxPipeline, num_tokens: int, num_inference_steps: int, device: torch.device) -> Tensor:
    """Timesteps of FLUX: sigmas linspace(1, 1/steps) through the resolution shift."""
    scheduler = pipeline.scheduler
    config = scheduler.config
    mu = calculate_shift(num_tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
    timesteps, _ = retrieve_timesteps(scheduler, num_inference_steps, device, sigmas=sigmas, mu=mu)
    scheduler.set_begin_index(0)
    pipeline._num_timesteps = len(timesteps)
    return timesteps


class Velocities:
    """The velocity of a group at one step after the other: one pass with references and, for image guidance, one without."""

    def __init__(self, transformer: MosaicFluxTransformer2DModel, group: Group, options: ResolvedOptions) -> None:
        """Nothing is computed yet.

        Args:
            transformer: Whose step cache, if it has one, forgets an earlier run, which may have ended halfway.
            group: The pictures; its tensors are looked up at every step.
            options: What the sampler is told.
        """
        self._transformer, self._group = transformer, group
        references = _reference_inputs(group, options)
        interval = refresh_interval(options.reference_cache, options.refresh_references, options.reference_attention)
        self._with_references = CachedTransformer(transformer, references, interval)
        self._without_references: CachedTransformer | None = None
        self._image_guidance_scale = options.image_guidance_scale
        if group.references is not None and options.image_guidance_scale != 1:
            # Zero latents stand in the places of the references, so that the two passes differ in looks only, not in length or positions.
            absent = {"reference_hidden_states": torch.zeros_like(group.references.latents), "capture": None}
            self._without_references = CachedTransformer(transformer, references | absent, interval)
        device, batch = group.latents.device, len(group.latents)
        self._guidance = torch.full([batch], options.guidance_scale, device=device) if transformer.config.guidance_embeds else None
        self._text_ids = text_position_ids(group.prompt_embeds.shape[1], device)
        self._image_ids = position_ids(group.target_grid, device=device)
        # It would compare the first step with the last one of another picture.
        if transformer.is_cache_enabled:
            transformer._reset_stateful_cache()

    def __call__(self, step: int, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Velocity [B, N, C] at a step, and the attention rows [B, K * N_ref, N] of the pass with references where they are read."""
        group = self._group
        inputs = {
            "hidden_states": group.latents,
            "timestep": t.expand(len(group.latents)).to(group.latents.dtype) / 1000,
            "guidance": self._guidance,
            "pooled_projections": group.pooled_prompt_embeds,
            "encoder_hidden_states": group.prompt_embeds,
            "txt_ids": self._text_ids,
            "img_ids": self._image_ids,
        }
        with self._step_cache("with references"):
            output = self._with_references(step, **inputs)
        velocity = output.sample
        if self._without_references is not None:
            with self._step_cache("without references"):
                without = self._without_references(step, **inputs).sample
            # As classifier-free guidance, with the references in the place of the prompt.
            velocity = without + self._image_guidance_scale * (velocity - without)
        return velocity, output.attention_rows

    def _step_cache(self, name: str) -> AbstractContextManager[None]:
        """Context of one of a step's passes: a step cache of the transformer, if it has one, remembers each apart."""
        return self._transformer.cache_context(name) if self._transformer.is_cache_enabled else nullcontext()


def _reference_inputs(group: Group, options: ResolvedOptions) -> dict[str, Any]:
    """The transformer's arguments that have to do with references; none where there are none."""
    references = group.references
    if references is None:
        return {}
    batch, num_references, num_tokens, _ = references.latents.shape
    device = references.latents.device
    inputs: dict[str, Any] = {
        "reference_hidden_states": references.latents,
        "reference_ids": reference_position_ids(references.grid, num_references, device, options.reference_position),
        "reference_attention": options.reference_attention,
        "reference_strength": references.strength,
    }
    if references.recorder is not None:
        # The report shows whole subjects, so that the rows of every reference token are read, in one order for all pictures.
        every_token = torch.arange(num_references * num_tokens, device=device)
        inputs["capture"] = CaptureRequest(every_token.expand(batch, -1))
    return inputs
