"""When the target decides: at which noise level the tokens of a subject settle on one reference, while a picture is sampled."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mosaic.config.loading import Config
from mosaic.method.grids import Grid
from mosaic.pipeline.inputs import target_grid
from mosaic.pipeline.options import ResolvedOptions
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from scripts.pocket import world
from scripts.pocket.evaluation import render_references
from scripts.pocket.judge import Judge
from scripts.pocket.places import Place, find_places
from scripts.pocket.regimes import nearest_reference
from scripts.pocket.target_rows import reading_target_rows

RADIUS = 0.17  # of the picture: the tokens of a place lie within


class SampledLooks(NamedTuple):
    """A picture and where its tokens looked on the way.

    Attributes:
        picture: As sampled.
        timesteps: Of the S steps, from 1 (noise) down.
        shares: [S, N_tgt, K], of a token's attention on references that on each, mean over heads and blocks; references in the order of
            `world.reference_order`.
    """

    picture: Image.Image
    timesteps: list[float]
    shares: Tensor


def sample_looks(pipeline: MosaicFluxPipeline, scene: world.Scene, config: Config, seed: int) -> SampledLooks:
    """Sample a scene's caption with its references, reading target rows at each step in the pass that sees the references."""
    blocks = len(pipeline.transformer.transformer_blocks) + len(pipeline.transformer.single_transformer_blocks)
    timesteps: list[float] = []
    found: list[Tensor] = []
    with reading_target_rows(pipeline.transformer) as rows:

        def after_step(_: Any, __: int, timestep: Tensor, ___: dict[str, Tensor]) -> dict[str, Tensor]:
            weights = torch.stack(rows[:blocks]).mean(dim=0)[0]  # a second pass, for image guidance, sees zero references
            found.append(weights.unflatten(1, (len(scene.placements), -1)).sum(dim=2))
            timesteps.append(float(timestep) / 1000)
            rows.clear()
            return {}

        arguments = {**ResolvedOptions.from_config(config).arguments, "reference_cache": False}
        generator = torch.Generator().manual_seed(seed)
        output = pipeline(
            [world.caption(scene)], [render_references(scene)], **arguments, generator=[generator], callback_on_step_end=after_step
        )
    weights = torch.stack(found)
    return SampledLooks(output.images[0], timesteps, weights / weights.sum(dim=-1, keepdim=True))


def place_shares(shares: Tensor, place: Place, grid: Grid) -> Tensor:
    """Mean shares [S, K] of the tokens of a place, of [S, N_tgt, K]."""
    rows, columns = (torch.arange(grid.num_tokens) // grid.columns, torch.arange(grid.num_tokens) % grid.columns)
    distance = ((columns + 0.5) / grid.columns - place.x) ** 2 + ((rows + 0.5) / grid.rows - place.y) ** 2
    return shares[:, distance <= max(RADIUS**2, float(distance.min()))].mean(dim=1)


def settled_step(shares: Tensor) -> int:
    """The first step from which on the reference that has most of [S, K] stays the same."""
    chosen = shares.argmax(dim=1)
    other = (chosen != chosen[-1]).nonzero()
    return int(other.max()) + 1 if len(other) else 0


class Settling(NamedTuple):
    """How far the places of pictures have decided at one step: shares, not a number where no picture has a place for each reference.

    Attributes:
        timestep: Of the step, 1 is noise.
        settled: Of the places, those that from here on look most at one reference.
        as_drawn: Of the places, those that look most at the reference whose looks the finished picture shows there.
        one_reference: Of the pictures, those of whose places two look most at one reference.
    """

    timestep: float
    settled: float
    as_drawn: float
    one_reference: float


def measure_settling(
    pipeline: MosaicFluxPipeline, judge: Judge, scenes: Sequence[world.Scene], config: Config, seed: int
) -> list[Settling]:
    """Step by step, how the places of the scenes' pictures settle; only pictures with one place for each reference are looked at."""
    grid = target_grid(ResolvedOptions.from_config(config), pipeline.encoders.vae_scale_factor)
    timesteps: list[float] = []
    settled, as_drawn, one_reference = list[list[bool]](), list[list[bool]](), list[list[bool]]()
    for number, scene in enumerate(scenes):
        looks = sample_looks(pipeline, scene, config, seed + number)
        timesteps = looks.timesteps
        identities = [scene.placements[k].identity for k in world.reference_order(scene)]
        names = [identity.class_name for identity in identities]
        places = [place for place in find_places(judge, [looks.picture])[0] if place.class_name in names]
        if sorted(place.class_name for place in places) != sorted(names):
            continue
        shares = [place_shares(looks.shares, place, grid) for place in places]
        chosen = torch.stack([of_place.argmax(dim=1) for of_place in shares])  # [places, S]
        settled += [[step >= settled_step(of_place) for step in range(len(timesteps))] for of_place in shares]
        drawn = torch.tensor([nearest_reference(place, identities) for place in places])
        as_drawn += (chosen == drawn[:, None]).tolist()
        one_reference.append([len(set(at_step.tolist())) < len(places) for at_step in chosen.T])
    means = [np.mean(rows, axis=0) if rows else np.full(len(timesteps), math.nan) for rows in (settled, as_drawn, one_reference)]
    return [Settling(timestep, *(float(mean[step]) for mean in means)) for step, timestep in enumerate(timesteps)]
