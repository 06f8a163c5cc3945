"""Measures of the pocket world: are subjects recognised as their references, do looks leak, where does attention peak?"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mosaic.config.loading import Config
from mosaic.data import MosaicBatch
from mosaic.method.correspondence import make_disjoint, reduce_points
from mosaic.method.grids import Grid
from mosaic.method.metrics import AttentionAccuracy, pool_accuracies
from mosaic.pipeline.latents import images_to_tensor
from mosaic.pipeline.options import ResolvedOptions
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.training.encoding import run_grids
from mosaic.training.validation import batch_attention_accuracy
from scripts.pocket import world
from scripts.pocket.judge import JUDGE_SIZE, Judge, make_candidates

FIRST_SEED = 50_000_000  # scenes of the evaluation; far from the seeds of data sets
REFERENCE_GRID = 32  # side of the grid on which reference points are found
MIN_VISIBLE = 0.5  # share of a subject that must be visible when the judge itself is judged


@dataclass(frozen=True)
class Proportion:
    """A share with its 95 % Wilson interval, over subjects."""

    share: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{100 * self.share:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def proportion(hits: Sequence[bool]) -> Proportion:
    """Share of True with its 95 % Wilson interval."""
    n, z = len(hits), 1.959964
    if n == 0:
        return Proportion(math.nan, math.nan, math.nan, 0)
    p = sum(hits) / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Proportion(p, max(centre - half, 0.0), min(centre + half, 1.0), n)


@dataclass(frozen=True)
class Result:
    """Measures of one arm at one K.

    Attributes:
        identification: Subjects recognised as their reference among 8 candidates (chance 12.5 %).
        leakage: Subjects nearer to another reference's looks than to their own; none at K = 1.
        presence: Subjects whose class the judge finds in the picture.
        count: Subjects of whose class it finds as many as the caption says.
        background: Pictures whose background it finds to be the caption's.
    """

    identification: Proportion
    leakage: Proportion
    presence: Proportion
    count: Proportion
    background: Proportion

    def to_dict(self) -> dict:
        """JSON-able; shares of nothing are null."""
        measures = asdict(self)
        return {name: {key: None if math.isnan(value) else value for key, value in entry.items()} for name, entry in measures.items()}


def held_out_scenes(num_references: int, count: int, regime: str = "distinct", first: int = 0) -> list[world.Scene]:
    """Scenes of K subjects with identities that training never saw, of a regime of `world.REGIMES`, from the `first` of them on.

    Raises:
        ValueError: There is no such regime, or none of so few subjects.
    """
    seed = FIRST_SEED + num_references * 1_000_000 + first
    return [world.sample_scene(seed + i, "heldout", num_references, regime) for i in range(count)]


def render_references(scene: world.Scene, ordered: str, size: int = world.REFERENCE_SIZE) -> list[Image.Image]:
    """The reference pictures of a scene's subjects, in the `world.reference_order` that a config's `data.reference_order` names."""
    return [world.render_reference(scene.placements[k].identity, size) for k in world.reference_order(scene, ordered)]


def generate(
    pipeline: MosaicFluxPipeline, scenes: Sequence[world.Scene], config: Config, with_references: bool, batch_size: int, seed: int
) -> list[Image.Image]:
    """Pictures for the scenes' captions, with their references or without; the start noise is the same in both."""
    pictures: list[Image.Image] = []
    for start in range(0, len(scenes), batch_size):
        part = scenes[start : start + batch_size]
        references = [render_references(scene, config.data.reference_order) for scene in part]
        pictures += pipeline(
            [world.caption(scene) for scene in part],
            references if with_references else None,
            **ResolvedOptions.from_config(config).arguments,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(part))],
        ).images
    return pictures


@dataclass(frozen=True)
class Outcome:
    """What the judge says of the subjects of one picture, in order.

    Attributes:
        identification: Whether each is recognised as its reference.
        leakage: Whether each is nearer to another reference's looks; empty at K = 1.
        presence: Whether each one's class is found.
        count: Whether as many of its class are found as the caption says.
        background: Whether the picture's background is that of the caption; one value.
    """

    identification: tuple[bool, ...]
    leakage: tuple[bool, ...]
    presence: tuple[bool, ...]
    count: tuple[bool, ...]
    background: tuple[bool]


MEASURES = tuple(field.name for field in fields(Outcome))


def judged_tensors(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures as the judge reads them, `[N, 3, JUDGE_SIZE, JUDGE_SIZE]`."""
    return images_to_tensor([picture.resize((JUDGE_SIZE, JUDGE_SIZE), Image.Resampling.LANCZOS) for picture in pictures])


def candidate_lists(scene: world.Scene) -> list[list[world.Identity]]:
    """The candidates among whom each subject of a scene is to be recognised, the same ones each time."""
    rng = np.random.default_rng([17, scene.seed])
    return [make_candidates(placement.identity, rng) for placement in scene.placements]


def identified(judge: Judge, pictures: Sequence[Image.Image], scenes: Sequence[world.Scene]) -> list[list[bool]]:
    """Whether the judge recognises each subject of each scene in its picture; the first of what `judge_scenes` asks, by itself."""
    found = []
    for picture, scene in zip(judged_tensors(pictures).split(1), scenes, strict=True):
        asked = zip(scene.placements, candidate_lists(scene), strict=True)
        found.append([listed[int(judge.identify(picture, who.identity.class_name, listed))] == who.identity for who, listed in asked])
    return found


def judge_scenes(judge: Judge, pictures: Sequence[Image.Image], scenes: Sequence[world.Scene], min_visible: float = 0.0) -> list[Outcome]:
    """Ask the judge about every subject; it sees the whole picture and the class, never the layout.

    Args:
        judge: The identity judge.
        pictures: One per scene.
        scenes: Whose identities are the truth.
        min_visible: Leave out subjects of which less is visible in the scene as drawn (for real renderings).
    """
    outcomes = []
    tensors = judged_tensors(pictures)
    for index, scene in enumerate(scenes):
        hits, leaks, present, counted = [], [], [], []
        identities = [placement.identity for placement in scene.placements]
        visible = world.visible_fractions(scene, JUDGE_SIZE) if min_visible else [1.0] * len(identities)
        picture, of_subjects = tensors[index : index + 1], candidate_lists(scene)
        probabilities, counts = judge.presence_probability(picture)[0], judge.counts(picture)[0]
        names = [identity.class_name for identity in identities]
        for k, identity in enumerate(identities):
            candidates = of_subjects[k]
            if visible[k] < min_visible:
                continue
            hits.append(candidates[int(judge.identify(picture, identity.class_name, candidates))] == identity)
            present.append(bool(probabilities[world.CLASSES.index(identity.class_name)] > 0.5))
            counted.append(int(counts[world.CLASSES.index(identity.class_name)]) == names.count(identity.class_name))
            if len(identities) > 1:
                looks = judge.score(picture, identity.class_name, identities)[0]
                leaks.append(bool(max(looks[j] for j in range(len(identities)) if j != k) > looks[k]))
        background = int(judge.backgrounds(picture)[0]) == world.BACKGROUNDS.index(scene.background)
        outcomes.append(Outcome(tuple(hits), tuple(leaks), tuple(present), tuple(counted), (background,)))
    return outcomes


def pool_outcomes(outcomes: Sequence[Outcome]) -> Result:
    """Shares over all subjects."""
    return Result(*(proportion([hit for outcome in outcomes for hit in getattr(outcome, name)]) for name in MEASURES))


def judge_pictures(judge: Judge, pictures: Sequence[Image.Image], scenes: Sequence[world.Scene], min_visible: float = 0.0) -> Result:
    """Shares over all subjects of what the judge says of pictures of these scenes (`judge_scenes`)."""
    return pool_outcomes(judge_scenes(judge, pictures, scenes, min_visible))


def scene_batch(scenes: Sequence[world.Scene], pipeline: MosaicFluxPipeline, config: Config) -> MosaicBatch:
    """Rendered scenes of one K as a training batch."""
    height, size, ordered = config.data.image_size[0], config.data.reference_size, config.data.reference_order
    grids = run_grids(config.data, pipeline.encoders.vae_scale_factor)
    images = [world.render_scene(scene, height).image for scene in scenes]
    return MosaicBatch(
        ids=[str(scene.seed) for scene in scenes],
        prompts=[world.caption(scene) for scene in scenes],
        targets=images_to_tensor(images),
        references=torch.stack([images_to_tensor(render_references(scene, ordered, size)) for scene in scenes]),
        points=[_token_points(scene, ordered, height, size, grids.reference, grids.target) for scene in scenes],
    )


def _token_points(scene: world.Scene, ordered: str, height: int, size: int, reference_grid: Grid, target_grid: Grid) -> list[Tensor]:
    fine_reference, fine_target = Grid(REFERENCE_GRID, REFERENCE_GRID), Grid(height, height)
    fine = [torch.as_tensor(world.correspondences(scene, k, REFERENCE_GRID, height, size)) for k in world.reference_order(scene, ordered)]
    return make_disjoint([reduce_points(pairs, fine_reference, fine_target, reference_grid, target_grid) for pairs in fine])


def scene_attention_accuracy(
    pipeline: MosaicFluxPipeline, scenes: Sequence[world.Scene], config: Config, batch_size: int, seed: int
) -> AttentionAccuracy:
    """Attention accuracy on rendered scenes at timesteps drawn as in training."""
    generator = torch.Generator().manual_seed(seed)
    batches = [scene_batch(scenes[start : start + batch_size], pipeline, config) for start in range(0, len(scenes), batch_size)]
    return pool_accuracies([batch_attention_accuracy(pipeline, batch, config, generator) for batch in batches])
