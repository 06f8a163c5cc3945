"""The objective on one batch, as Section 4 of the paper: `draw_inputs` makes the tokens, `train_step` the loss."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from mosaic.config.loading import Config, DataConfig, LossConfig
from mosaic.data import MosaicBatch
from mosaic.devices import to_device
from mosaic.method.correspondence import LEAST_POINTS, Points, batch_points, draw_points
from mosaic.method.flow import add_noise, sample_timesteps
from mosaic.method.losses import (
    MosaicLoss,
    correspondence_loss,
    cross_entropy,
    disentanglement_loss,
    flow_matching_loss,
    mosaic_loss,
    own_reference_loss,
    reference_distributions,
    region_loss,
    target_correspondence_loss,
)
from mosaic.method.tokens import position_ids, reference_position_ids, text_position_ids
from mosaic.model.attention_rows import CaptureRequest
from mosaic.model.transformer import MosaicTransformerOutput
from mosaic.pipeline.encoders import Encoders
from mosaic.training.encoding import EncodedBatch, batch_grids, encode_batch

Transformer = Callable[..., MosaicTransformerOutput]  # the model, or what wraps it


@dataclass(frozen=True)
class Draws:
    """What was drawn for a batch, beside its points and its target latents.

    Attributes:
        has_references: bool [B], False for a sample that has lost its references to condition dropout; on the latents' device.
        timesteps: [B] float32 in (0, 1), on the model's device.
        noise: [B, N_tgt, C], in the latents' dtype and on their device.
    """

    has_references: Tensor
    timesteps: Tensor
    noise: Tensor


class StepInputs(NamedTuple):
    """The arguments of `train_step` that a batch gives."""

    encoded: EncodedBatch
    points: Points
    draws: Draws


class CallSettings(NamedTuple):
    """How the transformer is called in a run.

    Attributes:
        reference_attention: "target", "joint" or "isolated".
        embeds_guidance: Whether the model embeds a guidance scale; in training it is 1.
        reference_position: "width" or "index".
    """

    reference_attention: str
    embeds_guidance: bool
    reference_position: str = "width"


def call_settings(config: Config, transformer: FluxTransformer2DModel) -> CallSettings:
    """How a run of this config calls this transformer, which is not yet wrapped for several processes."""
    model = config.model
    return CallSettings(model.reference_attention, transformer.config.guidance_embeds, model.reference_position)


def sample_generators(seed: int, first_index: int, count: int) -> list[torch.Generator]:
    """One CPU generator per sample, which depends only on (seed, global sample index).

    So a sample's dropout, points, latents, timestep and noise do not depend on which process, micro-batch or start of the run it
    falls into. Every new index, also of the same sample in a later epoch, gets new numbers.

    Args:
        seed: Seed of the run.
        first_index: Global sample index of the first sample: the number of samples that the run has seen before it.
        count: Number of samples, with indices in a row.
    """
    words = [np.random.SeedSequence([seed, index]).generate_state(1)[0] for index in range(first_index, first_index + count)]
    return [torch.Generator().manual_seed(int(word)) for word in words]


def draw_inputs(
    encoders: Encoders, batch: MosaicBatch, config: Config, generators: list[torch.Generator], device: torch.device
) -> StepInputs:
    """Encode a batch, and draw what is random about it.

    Args:
        encoders: The frozen VAE and text encoders.
        batch: Pictures, prompts and points; one K.
        config: The run's settings.
        generators: CPU generator of everything random, of each sample its own (`sample_generators`).
        device: That of the transformer.

    Raises:
        ValueError: A size is not divisible by the token size, or points do not fit the tokens.
    """
    # Every generator gives its numbers in the order of this function: dropout, points, the target's posterior, timestep, noise. Another
    # order would be another run: neither checkpoints nor measured numbers could be told from before.
    grids = batch_grids(batch, encoders.vae_scale_factor)

    # Condition dropout: a dropped reference is zero latents, which stay in the sequence, and its points go with it.
    drop_image, drop_text = _draw_dropout(config.data, generators)
    prompts = ["" if dropped else prompt for prompt, dropped in zip(batch.prompts, drop_text.tolist(), strict=True)]
    samples = [[p[:0] if dropped else p for p in pairs] for pairs, dropped in zip(batch.points, drop_image.tolist(), strict=True)]
    samples = [draw_points([sample], config.loss.max_points, own)[0] for sample, own in zip(samples, generators, strict=True)]
    points = batch_points(samples, grids.reference.num_tokens, grids.target.num_tokens, device, LEAST_POINTS)

    # Eq. 3: targets are drawn from the VAE posterior, references take its mode. All frozen.
    encoded = encode_batch(encoders, batch, prompts, config.model.text_length, generators, device)
    has_references = to_device(~drop_image, encoded.references.device)
    present = has_references.to(encoded.references)[:, None, None, None]
    encoded = replace(encoded, references=encoded.references * present)

    timesteps = to_device(torch.cat([sample_timesteps(1, grids.target.num_tokens, own) for own in generators]), device)
    noise = torch.stack([torch.randn(encoded.latents.shape[1:], generator=own) for own in generators])
    noise = to_device(noise, encoded.latents.device).to(encoded.latents)
    return StepInputs(encoded, points, Draws(has_references, timesteps, noise))


def train_step(
    transformer: Transformer,
    encoded: EncodedBatch,
    points: Points,
    draws: Draws,
    loss: LossConfig,
    step: int,
    call: CallSettings,
    attention_scale: float = 1.0,
) -> MosaicLoss:
    """The objective on one batch.

    Args:
        transformer: The transformer with its reference LoRA, maybe wrapped for several processes.
        encoded: Latents and embeddings of the batch; one K.
        points: Its supervised points (Eq. 1, Eq. 2).
        draws: Its timesteps and noise, and which samples have references.
        loss: The terms' settings.
        step: Optimizer step, for the schedule of the weights.
        call: How the transformer is called.
        attention_scale: Factor on the weights of all terms but flow matching, of `loss.max_pull`.
    """
    # Noise the target: x_t = (1 - t) x_0 + t eps.
    noisy_latents = add_noise(encoded.latents, draws.noise, draws.timesteps)

    # One joint sequence through all blocks (Eq. 4, Eq. 5, Eq. 6, Eq. 7). With the velocity come the rows (Eq. 8) at G(u) (Eq. 9, Eq. 11).
    output = predict(transformer, encoded, noisy_latents, draws.timesteps, capture_request(points, loss), call)
    rows = output.attention_rows
    assert rows is not None  # they were asked for

    # Each reference's distribution over the target tokens (Eq. 12), and which references have one.
    if loss.disentanglement_rows == "all":
        distributions, counted = output.reference_rows, draws.has_references.to(rows.device)[:, None].expand(-1, points.num_references)
        assert distributions is not None
    else:
        distributions, counted = reference_distributions(rows, points), points.reference_mask

    # The terms per sample (Eq. 10; Eq. 13 and Eq. 14), and their weighted sum over the batch (Eq. 15).
    supervised = is_supervised(loss, draws.timesteps).float()
    terms = {
        "flow_matching": flow_matching_loss(output.sample, draws.noise, encoded.latents),
        "correspondence": correspondence_loss(rows, points, loss.correspondence_reduction) * supervised,
        "disentanglement": disentanglement_loss(distributions, counted, loss.divergence, loss.disentanglement_cap) * supervised,
    }
    # What settings ask for beyond the paper; with none of them, nothing.
    further = further_terms(output, encoded, points, draws, loss)
    terms |= {name: term * supervised for name, term in further.items()}
    return mosaic_loss(terms, {name: weight * attention_scale for name, weight in loss_weights(loss, step).items()})


def capture_request(points: Points, loss: LossConfig) -> CaptureRequest:
    """The attention rows that the terms are read from."""
    every_token = loss.disentanglement_rows == "all" or loss.region_weight > 0
    request = CaptureRequest(points.global_index, every_token, loss.capture_blocks)
    if loss.supervises_target:
        request = replace(request, target_index=points.target_index, target_keys=loss.target_keys)
    if loss.heads == "each":
        request = replace(request, target_index=points.target_index, each_head=True)
    return request


def further_terms(
    output: MosaicTransformerOutput, encoded: EncodedBatch, points: Points, draws: Draws, loss: LossConfig
) -> dict[str, Tensor]:
    """Terms that the paper does not have, [B] each: of the target's rows, of regions, and SCAL where the mean over heads is taken of it."""
    reduction, weights, rows = loss.correspondence_reduction, output.head_weights, output.target_rows
    terms = {}
    if loss.region_weight > 0:
        assert output.reference_rows is not None  # they were asked for
        assert encoded.masks is not None  # so were they
        terms["region"] = region_loss(output.reference_rows, encoded.masks, draws.has_references.to(encoded.masks.device))
    if weights is not None:
        for name, of_heads in weights._asdict().items():
            if of_heads is not None:
                terms[name] = cross_entropy(of_heads, points, reduction)
    elif rows is not None:
        terms["target_correspondence"] = target_correspondence_loss(rows, points, reduction)
        terms["own_reference"] = own_reference_loss(rows, points, reduction)
    return terms


def loss_weights(loss: LossConfig, step: int) -> dict[str, float]:
    """Weights at a step of the terms beside flow matching, by the terms' names: of those that are computed."""
    scheduled = scheduled_weights(loss, step)
    correspondence = scheduled.get("correspondence_weight", loss.correspondence_weight)
    weights = {
        "correspondence": correspondence if loss.supervised_queries != "target" else 0.0,
        "disentanglement": scheduled["disentanglement_weight"],
    }
    if loss.supervises_target:
        weights["target_correspondence"] = correspondence if loss.supervised_queries != "reference" else 0.0
        weights["own_reference"] = scheduled.get("own_reference_weight", loss.own_reference_weight)
    if loss.region_weight > 0:
        weights["region"] = scheduled.get("region_weight", loss.region_weight)
    return weights


def scheduled_weights(loss: LossConfig, step: int) -> dict[str, float]:
    """Weights that change with the step, by the names of their settings; checkpoints tell them.

    `disentanglement_weight` is 0 until `disentanglement_start_step`, then rises linearly over the warm-up to its setting. With an
    `until_step` all weights fall linearly to 0 from `decay_start_step` to there.
    """
    done = step - loss.disentanglement_start_step
    warmth = float(done >= 0) if loss.disentanglement_warmup_steps == 0 else min(max(done / loss.disentanglement_warmup_steps, 0.0), 1.0)
    if loss.until_step is None:
        return {"disentanglement_weight": loss.disentanglement_weight * warmth}
    length = loss.until_step - loss.decay_start_step
    left = min(max((loss.until_step - step) / length, 0.0), 1.0) if length else float(step < loss.until_step)
    full = {"disentanglement_weight": loss.disentanglement_weight * warmth}
    full |= {name: getattr(loss, name) for name in ("correspondence_weight", "own_reference_weight", "region_weight")}
    return {name: weight * left for name, weight in full.items()}


def logged_terms(loss: LossConfig) -> list[str]:
    """Names of the values of `MosaicLoss` that a run's settings ask for."""
    return ["total", "flow_matching", *loss_weights(loss, 0)]


def is_supervised(loss: LossConfig, timesteps: Tensor) -> Tensor:
    """bool [B]: whether the attention losses count at the timesteps [B]; both ends of `supervised_timesteps` do."""
    low, high = loss.supervised_timesteps
    return (timesteps >= low) & (timesteps <= high)


def predict(
    transformer: Transformer,
    encoded: EncodedBatch,
    noisy_latents: Tensor,
    timesteps: Tensor,
    capture: CaptureRequest,
    call: CallSettings,
) -> MosaicTransformerOutput:
    """Velocity and attention rows of a batch; embedded guidance is 1, as always in training."""
    device, num_references = noisy_latents.device, encoded.references.shape[1]
    return transformer(
        hidden_states=noisy_latents,
        encoder_hidden_states=encoded.prompt_embeds,
        pooled_projections=encoded.pooled,
        timestep=timesteps,
        guidance=torch.ones_like(timesteps) if call.embeds_guidance else None,
        img_ids=position_ids(encoded.grids.target, device=device),
        txt_ids=text_position_ids(encoded.prompt_embeds.shape[1], device),
        reference_hidden_states=encoded.references,
        reference_ids=reference_position_ids(encoded.grids.reference, num_references, device, call.reference_position),
        reference_attention=call.reference_attention,
        capture=capture,
    )


def _draw_dropout(data: DataConfig, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    """bool [B] each: which samples lose their references, which their prompt; the three cases exclude one another."""
    u = torch.cat([torch.rand(1, generator=own) for own in generators])
    image_only, text_only = data.image_dropout, data.image_dropout + data.text_dropout
    both = text_only + data.both_dropout
    drop_both = (u >= text_only) & (u < both)
    return (u < image_only) | drop_both, ((u >= image_only) & (u < text_only)) | drop_both
