"""From the pictures of one sample to its points: features, matches, filters, consensus, disjointness."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mosaic.method.correspondence import coarse_index, owned_by_similarity, reduce_points
from mosaic.method.grids import Grid
from preprocess.extractors.protocol import Extractor
from preprocess.matching import matching
from preprocess.matching.affine import follows_affine
from preprocess.matching.masks import covered_cells, on_black, subject_mask
from preprocess.matching.matching import Match, match_features
from preprocess.matching.settings import MatchingSettings

CYCLE = 2  # cells by which a match may miss itself on the way back, to count as cyclic


@dataclass(frozen=True)
class ReferencePicture:
    """A reference of a sample: RGB picture, grid of u, and bool [height, width] over the target where it is seen (None: not known)."""

    image: Image.Image
    grid: Grid
    target_mask: np.ndarray | None


@dataclass(frozen=True)
class SamplePictures:
    """The pictures of a sample and the grid of v."""

    target: Image.Image
    target_grid: Grid
    references: Sequence[ReferencePicture]


@dataclass(frozen=True)
class FoundPoints:
    """Points of one reference, on the CPU.

    Attributes:
        pairs: int64 [P, 2] of (u, v), sorted by v.
        similarity: float32 [P], mean cosine over the extractors.
        scores: Of `match_scores`.
    """

    pairs: Tensor
    similarity: Tensor
    scores: dict[str, float] = field(default_factory=dict)

    def where(self, keep: Tensor) -> "FoundPoints":
        """Those in `keep`, bool [P]."""
        return replace(self, pairs=self.pairs[keep], similarity=self.similarity[keep])


@dataclass(frozen=True)
class PairFeatures:
    """What one extractor knows of a target and a reference: float32 [C, rows, columns] on the grids of matching."""

    target: Tensor
    reference: Tensor


def sample_seed(base: int, sample_id: str) -> int:
    """Seed of a sample, in [0, 2^63): one for all its pictures, so that equal pictures have equal features and match themselves."""
    return int.from_bytes(hashlib.sha256(f"{base}/{sample_id}".encode()).digest()[:8], "big") >> 1


def pair_features(
    pictures: SamplePictures, extractors: Sequence[Extractor], settings: MatchingSettings, seed: int
) -> list[list[PairFeatures]]:
    """Features of every target and reference pair.

    Args:
        pictures: Of one sample.
        extractors: N of them.
        settings: `grid`, `background` and `white_threshold` are used.
        seed: Of the extractors' noise.

    Returns:
        Per reference, per extractor.
    """
    target_grid = Grid(*settings.grid) if settings.grid else pictures.target_grid
    black = settings.background == "black"
    shared = None if black else [_features(extractor, pictures.target, target_grid, seed) for extractor in extractors]
    result = []
    for reference in pictures.references:
        image, target = reference.image, pictures.target
        if black and settings.white_threshold is not None:
            image = on_black(image, subject_mask(image, settings.white_threshold))
        if black and reference.target_mask is not None:
            target = on_black(target, reference.target_mask)
        grid = Grid(*settings.grid) if settings.grid else reference.grid
        targets = shared or [_features(extractor, target, target_grid, seed) for extractor in extractors]
        references = [_features(extractor, image, grid, seed) for extractor in extractors]
        result.append([PairFeatures(*pair) for pair in zip(targets, references, strict=True)])
    return result


def match_sample(pictures: SamplePictures, extractors: Sequence[Extractor], settings: MatchingSettings, seed: int) -> list[FoundPoints]:
    """Find the points of a sample on its own grids, disjoint over its references (Eq. 2).

    Where several references claim a target cell, the most similar match owns it, ties to the lowest reference.

    Args:
        pictures: Of one sample.
        extractors: At least one; with several, only matches on which they agree stay, and the first one's u is taken.
        settings: Of matching.
        seed: Of the extractors' noise.

    Returns:
        Per reference.

    Raises:
        ValueError: `settings.grid` is no multiple of the sample's grids.
    """
    found = []
    for reference, features in zip(pictures.references, pair_features(pictures, extractors, settings, seed), strict=True):
        found.append(_carried(_points(reference, features, settings), reference.grid, pictures.target_grid, settings.grid))
    owned = owned_by_similarity([own.pairs for own in found], [own.similarity for own in found])
    found = [own.where(keep) for own, keep in zip(found, owned, strict=True)]
    if settings.unique_u:
        found = [own.where(matching.best_per_reference_cell(own.pairs, own.similarity)) for own in found]
    return found


def masks_of(reference: ReferencePicture, features: PairFeatures, settings: MatchingSettings) -> tuple[Tensor | None, Tensor | None]:
    """Cells of the target and of the reference that take part, bool [rows, columns] each; None: all."""
    target_grid, grid = Grid(*features.target.shape[1:]), Grid(*features.reference.shape[1:])
    target_mask = None if reference.target_mask is None else covered_cells(reference.target_mask, target_grid)
    threshold = settings.white_threshold
    return target_mask, None if threshold is None else covered_cells(subject_mask(reference.image, threshold), grid)


def accepted(matches: Sequence[Match], target_grid: Grid, reference_grid: Grid, settings: MatchingSettings) -> Tensor:
    """Target cells whose matches pass all filters of all extractors and their consensus, bool [N_tgt]."""
    keep = matching.agree([match.index for match in matches], reference_grid, settings.consensus)
    for match in matches:
        if settings.cycle is not None:
            keep &= matching.is_cyclic(match, target_grid, settings.cycle)
        if settings.affine is not None:
            keep &= follows_affine(match, target_grid, reference_grid, settings.affine)
        if settings.min_similarity is not None:
            keep &= match.similarity >= settings.min_similarity
        if settings.min_margin is not None:
            keep &= match.margin >= settings.min_margin
    return keep


def match_scores(matches: Sequence[Match], target_grid: Grid, reference_grid: Grid, settings: MatchingSettings) -> dict[str, float]:
    """How far the matches of one reference can be trusted, before any filter.

    Args:
        matches: Of each extractor, with the same masks.
        target_grid: Grid of v.
        reference_grid: Grid of u.
        settings: `affine` and `consensus` are used.

    Returns:
        "cyclic": share of the matched target cells that come back to themselves within `CYCLE` cells, the mean over the extractors; with
        that filter, "affine": share that follows the affine map, likewise; and, of several extractors, "agreement": share on which all
        agree. Nothing where no cell is matched.
    """
    matched = matches[0].index != matching.NO_MATCH
    if not matched.any():
        return {}
    cyclic = [matching.is_cyclic(match, target_grid, CYCLE)[matched].float().mean().item() for match in matches]
    scores = {"cyclic": float(np.mean(cyclic))}
    if settings.affine is not None:
        follow = [follows_affine(match, target_grid, reference_grid, settings.affine)[matched] for match in matches]
        scores["affine"] = torch.stack(follow).float().mean().item()
    if len(matches) > 1:
        agreeing = matching.agree([match.index for match in matches], reference_grid, settings.consensus)
        scores["agreement"] = agreeing[matched].float().mean().item()
    return scores


def refined_index(features: PairFeatures, match: Match, reference_mask: Tensor | None, settings: MatchingSettings) -> Tensor:
    """Reference cells of a match, int64 [N_tgt], moved to the expected position if `settings.soft_argmax` says so."""
    if not settings.soft_argmax:
        return match.index
    positions = matching.soft_argmax(
        features.target,
        features.reference,
        match.index,
        reference_mask=reference_mask,
        window=settings.soft_argmax,
        temperature=settings.temperature,
        chunk_size=settings.chunk_size,
    )
    return matching.rounded_cells(positions, Grid(*features.reference.shape[1:]))


def _points(reference: ReferencePicture, features: Sequence[PairFeatures], settings: MatchingSettings) -> FoundPoints:
    """Points of one reference on the grids of matching."""
    target_mask, reference_mask = masks_of(reference, features[0], settings)
    matches = [
        match_features(
            pair.target,
            pair.reference,
            target_mask=target_mask,
            reference_mask=reference_mask,
            score=settings.score,
            chunk_size=settings.chunk_size,
        )
        for pair in features
    ]
    target_grid, reference_grid = Grid(*features[0].target.shape[1:]), Grid(*features[0].reference.shape[1:])
    keep = accepted(matches, target_grid, reference_grid, settings)
    index = refined_index(features[0], matches[0], reference_mask, settings)
    similarity = torch.stack([match.similarity[keep] for match in matches]).mean(dim=0)
    scores = match_scores(matches, target_grid, reference_grid, settings)
    return FoundPoints(matching.points_from_index(index, keep).cpu(), similarity.cpu(), scores)


def _carried(found: FoundPoints, reference_grid: Grid, target_grid: Grid, grid: tuple[int, int] | None) -> FoundPoints:
    """Points found on `grid`, carried to the sample's grids by majority vote; similarity becomes the mean over the votes."""
    if grid is None:
        return found
    points = reduce_points(found.pairs, Grid(*grid), Grid(*grid), reference_grid, target_grid)
    points = points[points[:, 1].argsort()]
    u = coarse_index(found.pairs[:, 0], Grid(*grid), reference_grid, "grid")
    v = coarse_index(found.pairs[:, 1], Grid(*grid), target_grid, "grid")
    ordered, place = (points[:, 0] * target_grid.num_tokens + points[:, 1]).sort()
    votes = u * target_grid.num_tokens + v
    at = torch.searchsorted(ordered, votes).clamp(max=max(len(ordered) - 1, 0))
    won = ordered[at] == votes if len(ordered) else torch.zeros_like(votes, dtype=torch.bool)
    sums = torch.zeros(len(points)).index_add(0, place[at[won]], found.similarity[won])
    return replace(found, pairs=points, similarity=sums / torch.bincount(place[at[won]], minlength=len(points)))


def _features(extractor: Extractor, image: Image.Image, grid: Grid, seed: int) -> Tensor:
    """Features of a picture on a grid."""
    return matching.resize_features(extractor(image, seed), grid)
