"""Checks of a pipeline call, before anything is computed, and its grouping by number of references."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mosaic.images import PreparedReference
from mosaic.method.grids import Grid, token_grid
from mosaic.method.tokens import REFERENCE_POSITIONS
from mosaic.model.attention import REFERENCE_ATTENTION_MODES
from mosaic.model.reference_cache import refresh_interval
from mosaic.pipeline.encoders import PromptEmbeddings
from mosaic.pipeline.options import ResolvedOptions, check_strength

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Reference = Image.Image | PreparedReference


@dataclass(frozen=True)
class PipelineInputs:
    """A checked call: everything is a list with one entry per prompt.

    Attributes:
        text: The prompts, or the embeddings that are given in their place.
        reference_images: Per prompt its pictures, maybe none.
        reference_latents: Per prompt [K, C, h, w], or None if pictures are given.
        reference_strengths: Per prompt one number per reference.
        latents: Packed start noise or None.
        generator: As given.
        num_pictures: Prompts x pictures per prompt.
    """

    text: list[str] | PromptEmbeddings
    reference_images: list[list[Reference]]
    reference_latents: list[Tensor | None] | None
    reference_strengths: list[list[float]]
    latents: Tensor | None
    generator: torch.Generator | list[torch.Generator] | None
    num_pictures: int


def check_inputs(
    *,
    prompt: str | Sequence[str] | None,
    reference_images: Sequence | None,
    latents: Tensor | None,
    prompt_embeds: Tensor | None,
    pooled_prompt_embeds: Tensor | None,
    reference_latents: Tensor | Sequence[Tensor] | None,
    reference_strength: float | Sequence[float] | Sequence[Sequence[float]] | None,
    num_images_per_prompt: int,
    generator: torch.Generator | list[torch.Generator] | None,
    has_reference_lora: bool,
    callback_tensors: Sequence[str],
    allowed_callback_tensors: Sequence[str],
) -> PipelineInputs:
    """Check the arguments of a call against each other; see `MosaicFluxPipeline.__call__` for their meaning.

    Raises:
        ValueError: Naming what must hold, what was given and the cure.
    """
    text = _check_prompts(prompt, prompt_embeds, pooled_prompt_embeds)
    num_prompts = len(text.prompt_embeds) if isinstance(text, PromptEmbeddings) else len(text)
    if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt must be a positive integer, got {num_images_per_prompt!r}.")
    num_pictures = num_prompts * num_images_per_prompt
    if isinstance(generator, list) and len(generator) != num_pictures:
        raise ValueError(f"a list of generators must hold one per picture: {num_pictures}, got {len(generator)}.")
    for one in generator if isinstance(generator, list) else [generator]:
        if one is not None and one.device.type != "cpu":
            raise ValueError(f"generators must be of the CPU, got one of {one.device}: give torch.Generator().manual_seed(...).")
    unknown = sorted(set(callback_tensors) - set(allowed_callback_tensors))
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs may name {list(allowed_callback_tensors)}, got {unknown}.")
    if reference_images is not None and reference_latents is not None:
        raise ValueError("give reference_images or reference_latents, not both.")
    images = _per_prompt_images(reference_images, num_prompts, single=not isinstance(prompt, (list, tuple)))
    tensors = _per_prompt_latents(reference_latents, num_prompts)
    counts = [len(x) if x is not None else 0 for x in (images if tensors is None else tensors)]
    strengths = _per_prompt_strengths(reference_strength, counts, single=not isinstance(prompt, (list, tuple)))
    if (any(images) or any(x is not None and len(x) for x in tensors or [])) and not has_reference_lora:
        raise ValueError("references need a reference LoRA: call load_reference_lora(...) first, or leave the references out.")
    return PipelineInputs(text, images, tensors, strengths, latents, generator, num_pictures)


def prepared_references(references: Sequence[Sequence[Reference]], size: int, scale: float) -> list[list[Image.Image]]:
    """Per prompt its references as the model sees them; those that are prepared already are not prepared again.

    Args:
        references: Per prompt its pictures.
        size: Side in pixels.
        scale: Share of the side that a subject's long side takes.

    Raises:
        ValueError: One was prepared for another size or scale, or cannot be prepared.
    """
    prepared: list[list[Image.Image]] = []
    for p, pictures in enumerate(references):
        prepared.append([])
        for k, picture in enumerate(pictures):
            if not isinstance(picture, PreparedReference):
                picture = PreparedReference.make(picture, size, scale)
            elif (picture.size, picture.scale) != (size, scale):
                wanted, given = f"{size} px at scale {scale:g}", f"{picture.size} px at scale {picture.scale:g}"
                raise ValueError(f"reference_images[{p}][{k}] must be prepared for {wanted}, as this call says, got one of {given}.")
            prepared[-1].append(picture.picture)
    return prepared


def target_grid(options: ResolvedOptions, vae_scale_factor: int) -> Grid:
    """The target's token grid.

    Raises:
        ValueError: The size of the picture or of the references is no multiple of the token size.
    """
    grid, size = token_grid(options.height, options.width, vae_scale_factor), options.reference_size
    token_grid(size, size, vae_scale_factor, where="reference_size")
    return grid


def check_sampling(inputs: PipelineInputs, options: ResolvedOptions, output_type: str, grid: Grid, token_channels: int) -> None:
    """Check the sampler's settings, and the tensors of a call against the model.

    Args:
        inputs: The checked call.
        options: Its settings.
        output_type: One of `OUTPUT_TYPES`.
        grid: The target's token grid.
        token_channels: Channels of a packed token of this model (4 x latent channels).

    Raises:
        ValueError: Naming what must hold, and what was given.
    """
    steps, mode = options.num_inference_steps, options.reference_attention
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"num_inference_steps must be a positive integer, got {steps!r}.")
    if mode not in REFERENCE_ATTENTION_MODES:
        raise ValueError(f"reference_attention must be one of {REFERENCE_ATTENTION_MODES}, got {mode!r}.")
    if options.reference_position not in REFERENCE_POSITIONS:
        raise ValueError(f"reference_position must be one of {REFERENCE_POSITIONS}, got {options.reference_position!r}.")
    for name in ("guidance_scale", "image_guidance_scale"):
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}.")
    refresh_interval(options.reference_cache, options.refresh_references, mode)
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}.")
    expected = (inputs.num_pictures, grid.num_tokens, token_channels)
    if inputs.latents is not None and tuple(inputs.latents.shape) != expected:
        raise ValueError(f"latents must be packed noise of shape {expected} for this call, got {tuple(inputs.latents.shape)}.")
    for index, tensor in enumerate(inputs.reference_latents or []):
        if tensor is not None and len(tensor) and tensor.shape[1] != token_channels // 4:
            wanted = f"{token_channels // 4} channels, as this model's VAE"
            raise ValueError(f"reference_latents[{index}] must have {wanted}, got {tensor.shape[1]}.")


def _check_prompts(
    prompt: str | Sequence[str] | None, prompt_embeds: Tensor | None, pooled_prompt_embeds: Tensor | None
) -> list[str] | PromptEmbeddings:
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("give prompt or prompt_embeds (with pooled_prompt_embeds), one of the two.")
    if prompt_embeds is not None:
        if pooled_prompt_embeds is None or len(pooled_prompt_embeds) != len(prompt_embeds):
            raise ValueError("prompt_embeds need pooled_prompt_embeds with as many rows.")
        return PromptEmbeddings(prompt_embeds, pooled_prompt_embeds)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    for index, text in enumerate(prompts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"prompt[{index}] must be a non-empty string, got {text!r}.")
    if not prompts:
        raise ValueError("prompt must not be an empty list.")
    return prompts


def _per_prompt_images(images: Sequence | None, num_prompts: int, single: bool) -> list[list[Reference]]:
    if images is None:
        return [[] for _ in range(num_prompts)]
    if isinstance(images, Image.Image):
        raise ValueError("reference_images must be a list of pictures, got a single picture: write reference_images=[picture].")
    nested = [list(images)] if single and not any(isinstance(x, (list, tuple)) for x in images) else list(images)
    if len(nested) != num_prompts or not all(isinstance(x, (list, tuple)) for x in nested):
        raise ValueError(
            f"reference_images must hold one list of pictures per prompt: {num_prompts} lists, got {len(images)} entries "
            f"({', '.join(type(x).__name__ for x in list(images)[:4])})."
        )
    for p, pictures in enumerate(nested):
        for k, picture in enumerate(pictures):
            if not isinstance(picture, Reference):
                given = type(picture).__name__
                raise ValueError(f"reference_images[{p}][{k}] must be a PIL picture, got {given}; see mosaic.load_image().")
    return [list(pictures) for pictures in nested]


def _per_prompt_latents(latents: Tensor | Sequence[Tensor] | None, num_prompts: int) -> list[Tensor | None] | None:
    if latents is None:
        return None
    tensors = [latents] if isinstance(latents, Tensor) and latents.ndim == 4 else list(latents)
    if len(tensors) != num_prompts:
        raise ValueError(f"reference_latents must hold one tensor [K, C, h, w] per prompt: {num_prompts}, got {len(tensors)}.")
    for index, tensor in enumerate(tensors):
        if tensor is not None and (tensor.ndim != 4 or tensor.shape[-1] % 2 or tensor.shape[-2] % 2):
            raise ValueError(f"reference_latents[{index}] must have shape [K, C, h, w] with even h and w, got {tuple(tensor.shape)}.")
    if len({tuple(t.shape[1:]) for t in tensors if t is not None and len(t)}) > 1:
        raise ValueError("all references of a call share one size; reference_latents differ in [C, h, w].")
    return tensors


def _per_prompt_strengths(strength: Any, counts: Sequence[int], single: bool) -> list[list[float]]:
    """Strengths of each prompt's references, of which there are `counts`."""
    if strength is None or isinstance(strength, (int, float)):
        number = 1.0 if strength is None else strength
        check_strength(number, "reference_strength")
        return [[number] * count for count in counts]
    nested = list(strength)
    if single and not any(isinstance(x, (list, tuple)) for x in nested):
        nested = [nested]
    if len(nested) != len(counts) or not all(isinstance(x, (list, tuple)) for x in nested):
        raise ValueError(f"reference_strength must be a number, or one list of numbers per prompt: {len(counts)} lists, got {strength!r}.")
    for p, (numbers, count) in enumerate(zip(nested, counts, strict=True)):
        if len(numbers) != count:
            raise ValueError(f"reference_strength[{p}] must hold one number per reference of that prompt: {count}, got {len(numbers)}.")
        for k, number in enumerate(numbers):
            check_strength(number, f"reference_strength[{p}][{k}]")
    return [list(numbers) for numbers in nested]
