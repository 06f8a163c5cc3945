"""Validation of a run: panels of held-out cases, and attention accuracy on held-out samples at fixed noise."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from mosaic.config.loading import Config
from mosaic.data import BucketBatchSampler, MosaicBatch, TrainingDataset, collate
from mosaic.images import PreparedReference
from mosaic.method.correspondence import LEAST_POINTS, Points, batch_points
from mosaic.method.flow import add_noise, sample_timesteps
from mosaic.method.grids import Grid
from mosaic.method.metrics import AttentionAccuracy, attention_accuracy, pool_accuracies
from mosaic.model.attention_rows import CaptureRequest
from mosaic.model.transformer import MosaicTransformerOutput
from mosaic.pipeline.options import ResolvedOptions
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.rendering.cases.reading import read_cases
from mosaic.rendering.checks import check_size
from mosaic.reports.figures import case_panel, reference_side, save_picture, tensor_to_image
from mosaic.training.encoding import Grids, encode_batch
from mosaic.training.objective import call_settings, predict

logger = logging.getLogger(__name__)

ACCURACY_BATCHES = 4  # batches of held-out samples on which attention accuracy is measured


class ValidationStopped(Exception):
    """Validation was asked to stop between two pictures or batches; nothing was measured."""


@torch.no_grad()
def validate(
    pipeline: MosaicFluxPipeline,
    dataset: TrainingDataset,
    panels: "Sequence[Panel] | None",
    config: Config,
    folder: Path | None,
    asked_to_stop: Callable[[], bool],
) -> AttentionAccuracy:
    """Render panels into `folder` and measure attention accuracy.

    Args:
        pipeline: With the adapter attached.
        dataset: Held-out samples.
        panels: By `read_panels`; None: samples spread over the held-out ones.
        config: The run's settings; `validation` and `model` are used.
        folder: Gets `case_<i>.png`; None: nothing is written, in a process that only takes its part in a sharded forward pass.
        asked_to_stop: Called before each picture and batch; in a sharded pass all processes must get the same answer.

    Raises:
        ValidationStopped: `asked_to_stop` said so; no panel or accuracy is missing in part.
    """
    validation = config.validation

    def go_on() -> None:
        if asked_to_stop():
            raise ValidationStopped

    for index, panel in enumerate(_sample_panels(dataset, config) if panels is None else panels):
        go_on()
        generator = torch.Generator().manual_seed(validation.seed + index)
        strengths, arguments = panel.strengths, panel.options.arguments
        result = pipeline(panel.prompt, panel.references, reference_strength=strengths, generator=generator, **arguments)
        picture = result.images[0]
        assert isinstance(picture, Image.Image)
        if folder is not None:
            _write_panel(case_panel(panel.pictures, picture, panel.prompt), folder / f"case_{index}.png")
    sampler = BucketBatchSampler(dataset.batch_keys, max(config.training.batch_size, 4), seed=validation.seed)
    batches = DataLoader(dataset, batch_sampler=list(sampler)[:ACCURACY_BATCHES], collate_fn=collate)
    generator = torch.Generator().manual_seed(validation.seed)
    accuracies = []
    for batch in batches:
        go_on()
        accuracies.append(batch_attention_accuracy(pipeline, batch, config, generator))
    return pool_accuracies(accuracies)


def _write_panel(panel: Image.Image, path: Path) -> None:
    """Write a panel; a failure is logged, for other processes may already wait in the next sharded forward pass."""
    try:
        save_picture(panel, path)
    except OSError:
        logger.exception("%s cannot be written; validation goes on", path)


class Panel(NamedTuple):
    """What is rendered again at every validation.

    Attributes:
        prompt: Of its case or sample.
        pictures: K reference pictures, as the panel shows them.
        references: The same for the pipeline; those of a cases file are prepared once for the whole run.
        strengths: One per reference; None: 1 for all.
        options: What the sampler is told.
    """

    prompt: str
    pictures: Sequence[Image.Image]
    references: Sequence[Image.Image | PreparedReference]
    strengths: list[float] | None
    options: ResolvedOptions


def panel_options(config: Config) -> ResolvedOptions:
    """What the sampler is told for the panels of held-out samples, and of cases where these leave it open."""
    height, width = config.data.image_size
    return ResolvedOptions(
        height=height,
        width=width,
        num_inference_steps=config.validation.num_inference_steps,
        guidance_scale=config.validation.guidance_scale,
        image_guidance_scale=config.validation.image_guidance_scale,
        reference_size=config.data.reference_size,
        reference_attention=config.model.reference_attention,
        reference_position=config.model.reference_position,
        max_sequence_length=config.model.text_length,
    )


def read_panels(config: Config, vae_scale_factor: int) -> list[Panel] | None:
    """Check the cases of `validation.cases`, and their sizes against the model, and prepare the panels of the first ones.

    Returns:
        The panels; None where the config names no cases file.

    Raises:
        FileNotFoundError: The file or a picture is missing.
        ValueError: A case is bad, or its size does not fit the tokens.
    """
    validation, options = config.validation, panel_options(config)
    if validation.cases is None:
        return None
    file = read_cases(validation.cases, config.data.reference_size).all_good()
    for case in file.cases:
        check_size(options.given(case.options), case, vae_scale_factor)
    panels = []
    for case in file.cases[: validation.num_cases]:
        loaded = [file.pictures.load(path) for path in case.image_paths]
        pictures = [picture.tiles[reference_side(len(loaded))] for picture in loaded]
        references = [picture.prepared for picture in loaded]
        strengths = [reference.strength for reference in case.references]
        panels.append(Panel(case.prompt, pictures, references, strengths, options.given(case.options)))
    return panels


def _sample_panels(dataset: TrainingDataset, config: Config) -> list[Panel]:
    """Panels of samples spread over the held-out ones."""
    validation, options = config.validation, panel_options(config)
    count = min(validation.num_cases, len(dataset))
    samples = [dataset[index * len(dataset) // count] for index in range(count)]
    pictures = [[tensor_to_image(reference) for reference in sample.references] for sample in samples]
    return [Panel(sample.prompt, images, images, None, options) for sample, images in zip(samples, pictures, strict=True)]


def batch_attention_accuracy(
    pipeline: MosaicFluxPipeline, batch: MosaicBatch, config: Config, generator: torch.Generator
) -> AttentionAccuracy:
    """Attention accuracy of one batch at timesteps drawn as in training, without dropout."""
    return attention_accuracy(*batch_attention_rows(pipeline, batch, config, generator))


def batch_attention_rows(
    pipeline: MosaicFluxPipeline, batch: MosaicBatch, config: Config, generator: torch.Generator
) -> tuple[Tensor, Points, Grid]:
    """Attention rows [B, P, N_tgt] of one batch at timesteps drawn as in training; their points and the target's grid."""
    output, points, grids = captured_pass(
        pipeline, batch, config, generator, lambda points: CaptureRequest(points.global_index, blocks=config.loss.capture_blocks)
    )
    assert output.attention_rows is not None  # they were asked for
    return output.attention_rows, points, grids.target


@torch.no_grad()
def captured_pass(
    pipeline: MosaicFluxPipeline,
    batch: MosaicBatch,
    config: Config,
    generator: torch.Generator,
    request_rows: Callable[[Points], CaptureRequest],
) -> tuple[MosaicTransformerOutput, Points, Grids]:
    """One pass over a batch at timesteps drawn as in training, without dropout; the rows are those that are asked for at its points."""
    device = pipeline.transformer.device
    encoded = encode_batch(pipeline.encoders, batch, batch.prompts, config.model.text_length, None, device)
    grids = encoded.grids
    points = batch_points(batch.points, grids.reference.num_tokens, grids.target.num_tokens, device, LEAST_POINTS)
    timesteps = sample_timesteps(len(batch.prompts), grids.target.num_tokens, generator).to(encoded.latents)
    noise = torch.randn(encoded.latents.shape, generator=generator).to(encoded.latents)
    noisy_latents, call = add_noise(encoded.latents, noise, timesteps), call_settings(config, pipeline.transformer)
    return predict(pipeline.transformer, encoded, noisy_latents, timesteps, request_rows(points), call), points, grids
