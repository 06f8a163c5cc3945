"""Measures of pictures whose subjects may be look-alikes: who stands where is asked of the picture's places, never of the layout.

A judge finds places, each with a class and with looks. Each place bears the look of the reference that it is nearest to by its looks, among
all references of the scene; and places are assigned to references of their class so that the sum of likelihoods is largest.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from scripts.pocket import world
from scripts.pocket.judge import Judge, make_candidates
from scripts.pocket.places import Place, find_places
from scripts.pocket.statistics import Estimate, over_seeds_and_scenes


class RegimeOutcome(NamedTuple):
    """What the judge says of one picture: shares, not a number where there is nothing to speak of.

    Attributes:
        apart: 1 if the picture has a place for each reference and no other, each of its reference's class, and each nearest to another one.
        same_look: 1 if two places bear the look of one reference.
        identification: Of the references, those whose assigned place is recognised as theirs among 8 candidates (chance 12.5 %).
        blending: Of the places, those with the palette of one reference and the pattern of another; asked only where such a pair is no
            reference's own.
        missing: Of the references, those without a place of their class.
        doubled: Places of a class beyond as many as the caption says, per reference.
    """

    apart: float
    same_look: float
    identification: float
    blending: float
    missing: float
    doubled: float


def assign(likelihood: np.ndarray) -> dict[int, int]:
    """The place [row] of each reference [column] by the assignment that has the largest sum; of the more numerous some have none."""
    from scipy.optimize import linear_sum_assignment  # a slow import that only this needs

    places, references = linear_sum_assignment(likelihood, maximize=True)
    return dict(zip(references.tolist(), places.tolist(), strict=True))


def assign_places(places: Sequence[Place], identities: Sequence[world.Identity]) -> dict[int, int]:
    """By index of a reference the index of its place, class by class; references without one are left out."""
    found: dict[int, int] = {}
    for name in dict.fromkeys(identity.class_name for identity in identities):
        rows = [i for i, place in enumerate(places) if place.class_name == name]
        columns = [k for k, identity in enumerate(identities) if identity.class_name == name]
        likelihood = np.array([[places[i].score(identities[k]) for k in columns] for i in rows]).reshape(len(rows), len(columns))
        found |= {columns[column]: rows[row] for column, row in assign(likelihood).items()}
    return found


def nearest_reference(place: Place, identities: Sequence[world.Identity]) -> int:
    """Index of the reference whose looks the place has; of equal looks that of the place's class."""
    return max(range(len(identities)), key=lambda k: (place.score(identities[k]), identities[k].class_name == place.class_name))


def judge_places(places: Sequence[Place], scene: world.Scene) -> RegimeOutcome:
    """Measures of the places that a judge found in a picture for the caption and the references of a scene."""
    identities = [placement.identity for placement in scene.placements]
    wanted = Counter(identity.class_name for identity in identities)
    places = [place for place in places if place.class_name in wanted]
    there = Counter(place.class_name for place in places)
    assigned, nearest = assign_places(places, identities), [nearest_reference(place, identities) for place in places]
    own_class = all(identities[k].class_name == place.class_name for place, k in zip(places, nearest, strict=True))
    rng, recognised = np.random.default_rng([17, scene.seed]), 0
    for k, identity in enumerate(identities):
        candidates = make_candidates(identity, rng)
        if k in assigned:
            recognised += max(candidates, key=places[assigned[k]].score) == identity
    pairs = {(identity.palette, identity.pattern) for identity in identities}
    mixtures = {(one.palette, other.pattern) for one in identities for other in identities} - pairs
    blended = [(place.likeliest("palette"), place.likeliest("pattern")) in mixtures for place in places]
    count = len(identities)
    return RegimeOutcome(
        apart=float(own_class and there == wanted and len(set(nearest)) == count),
        same_look=float(len(set(nearest)) < len(places)),
        identification=recognised / count,
        blending=float(np.mean(blended)) if mixtures and places else math.nan,
        missing=sum(max(wanted[name] - there[name], 0) for name in wanted) / count,
        doubled=sum(max(there[name] - wanted[name], 0) for name in wanted) / count,
    )


def judge_regime(judge: Judge, pictures: Sequence[Image.Image], scenes: Sequence[world.Scene]) -> list[RegimeOutcome]:
    """Measures of one picture per scene."""
    return [judge_places(places, scene) for places, scene in zip(find_places(judge, pictures), scenes, strict=True)]


def estimate(outcomes: Sequence[Sequence[RegimeOutcome]], measure: str) -> Estimate:
    """Mean of a measure with its interval, over seeds (one list of outcomes each, of the same scenes) crossed with scenes."""
    return over_seeds_and_scenes([[getattr(outcome, measure) for outcome in of_seed] for of_seed in outcomes])
