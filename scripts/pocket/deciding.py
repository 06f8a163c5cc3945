"""When the target decides: at which noise level the tokens of a subject settle on one reference, while a picture is sampled."""

from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mosaic.config.loading import Config
from mosaic.method.grids import Grid
from mosaic.pipeline.options import ResolvedOptions
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from scripts.pocket import world
from scripts.pocket.evaluation import render_references
from scripts.pocket.places import Place
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
