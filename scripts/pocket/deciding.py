"""When the target decides: at which noise level the tokens of subjects settle on a reference each, while a picture is sampled."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mosaic.config.loading import Config
from mosaic.method.grids import Grid
from mosaic.model.attention_rows import CaptureRequest
from mosaic.model.transformer import MosaicFluxTransformer2DModel, MosaicTransformerOutput
from mosaic.pipeline.inputs import target_grid
from mosaic.pipeline.options import ResolvedOptions
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from scripts.pocket import world
from scripts.pocket.evaluation import render_references
from scripts.pocket.judge import Judge
from scripts.pocket.places import Place, find_places
from scripts.pocket.regimes import assign, nearest_reference

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


@contextmanager
def reading_target_rows(transformer: MosaicFluxTransformer2DModel) -> Iterator[list[Tensor]]:
    """While active, every pass with references is asked for the rows of all target tokens, [B, N_tgt, K * N_ref], and appends them."""
    rows: list[Tensor] = []

    def ask(_: nn.Module, positional: tuple[()], named: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        batch, num_target_tokens, _ = named["hidden_states"].shape
        every_token = torch.arange(num_target_tokens).expand(batch, -1)
        return positional, named | {"capture": CaptureRequest(target_index=every_token, target_keys="all")}

    def read(_: nn.Module, __: Any, output: MosaicTransformerOutput) -> None:
        assert output.target_rows is not None  # they were asked for
        rows.append(output.target_rows)

    with ExitStack() as hooks:
        hooks.callback(transformer.register_forward_pre_hook(ask, with_kwargs=True).remove)
        hooks.callback(transformer.register_forward_hook(read).remove)
        yield rows


def sample_looks(pipeline: MosaicFluxPipeline, scene: world.Scene, config: Config, seed: int) -> SampledLooks:
    """Sample a scene's caption with its references, reading target rows at each step in the pass that sees the references."""
    timesteps: list[float] = []
    found: list[Tensor] = []
    with reading_target_rows(pipeline.transformer) as rows:

        def after_step(_: Any, __: int, timestep: Tensor, ___: dict[str, Tensor]) -> dict[str, Tensor]:
            # Of the first pass: a second one, for image guidance, sees zero references.
            found.append(rows[0][0].unflatten(1, (len(scene.placements), -1)).sum(dim=2))
            timesteps.append(float(timestep) / 1000)
            rows.clear()
            return {}

        arguments = {**ResolvedOptions.from_config(config).arguments, "reference_cache": False}
        generator = torch.Generator().manual_seed(seed)
        references = render_references(scene, config.data.reference_order)
        output = pipeline([world.caption(scene)], [references], **arguments, generator=[generator], callback_on_step_end=after_step)
    picture, weights = output.images[0], torch.stack(found)
    assert isinstance(picture, Image.Image), "the pipeline puts out pictures unless told otherwise"
    return SampledLooks(picture, timesteps, weights / weights.sum(dim=-1, keepdim=True))


def place_shares(shares: Tensor, place: Place, grid: Grid) -> Tensor:
    """Mean shares [S, K] of the tokens of a place, of [S, N_tgt, K]."""
    rows, columns = (torch.arange(grid.num_tokens) // grid.columns, torch.arange(grid.num_tokens) % grid.columns)
    distance = ((columns + 0.5) / grid.columns - place.x) ** 2 + ((rows + 0.5) / grid.rows - place.y) ** 2
    return shares[:, distance <= max(RADIUS**2, float(distance.min()))].mean(dim=1)


def settled_step(choices: Sequence[object]) -> int:
    """The first step from which on what is chosen stays the same."""
    return max((step + 1 for step, choice in enumerate(choices) if choice != choices[-1]), default=0)


def contrast(log_shares: np.ndarray, assigned: dict[int, int]) -> float:
    """How much more, in nats, the places [rows] look at their own references [columns] than the other places do, mean over references."""
    own = [log_shares[place, k] - np.delete(log_shares[:, k], place).mean() for k, place in assigned.items()]
    return float(np.mean(own))


class Settling(NamedTuple):
    """How far pictures have decided at one step which place has which reference; not a number where there are no such pictures.

    Places are assigned to references by the logarithms of their shares, in which a liking of all places for one reference cancels.

    Attributes:
        timestep: Of the step, 1 is noise.
        settled: Share of the pictures whose assignment stays the same from here on.
        as_drawn: Of the pictures whose places bear the looks of different references, the share with the assignment that they show at last.
        contrast: Of those pictures, mean of `contrast`.
        contrast_same_look: Of the others, in which two places bear one look.
    """

    timestep: float
    settled: float
    as_drawn: float
    contrast: float
    contrast_same_look: float


def measure_settling(
    pipeline: MosaicFluxPipeline, judge: Judge, scenes: Sequence[world.Scene], config: Config, seed: int
) -> list[Settling]:
    """Step by step, how the pictures of scenes settle; only those with one place for each of two or more references are looked at."""
    grid = target_grid(ResolvedOptions.from_config(config), pipeline.encoders.vae_scale_factor)
    timesteps: list[float] = []
    settled, as_drawn, apart, same_look = list[list[bool]](), list[list[bool]](), list[list[float]](), list[list[float]]()
    for number, scene in enumerate(scenes):
        looks = sample_looks(pipeline, scene, config, seed + number)
        timesteps = looks.timesteps
        identities = [scene.placements[k].identity for k in world.reference_order(scene, config.data.reference_order)]
        names = [identity.class_name for identity in identities]
        places = [place for place in find_places(judge, [looks.picture])[0] if place.class_name in names]
        if sorted(place.class_name for place in places) != sorted(names) or len(places) < 2:
            continue
        log_shares = torch.stack([place_shares(looks.shares, place, grid) for place in places], dim=1).log().numpy()  # [S, places, K]
        chosen = [assign(at_step) for at_step in log_shares]
        settled.append([step >= settled_step(chosen) for step in range(len(timesteps))])
        contrasts = [contrast(*at_step) for at_step in zip(log_shares, chosen, strict=True)]
        drawn = {nearest_reference(place, identities): index for index, place in enumerate(places)}
        if len(drawn) == len(places):
            as_drawn.append([choice == drawn for choice in chosen])
            apart.append(contrasts)
        else:
            same_look.append(contrasts)
    columns = [np.mean(rows, axis=0) if rows else np.full(len(timesteps), math.nan) for rows in (settled, as_drawn, apart, same_look)]
    return [Settling(timestep, *(float(column[step]) for column in columns)) for step, timestep in enumerate(timesteps)]
