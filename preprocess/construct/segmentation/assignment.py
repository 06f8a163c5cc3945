"""Who is who: each subject is given one thing that answers to its phrase, and no thing is given twice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from preprocess.construct.segmentation.masks import mask_box, overlap_of_masks
from preprocess.construct.segmentation.protocol import Instance

SAME_THING = 0.5  # intersection over union from which two masks show one thing


class Assigned(NamedTuple):
    """What a subject was given.

    Attributes:
        instance: None: nothing is left that answers to its phrase.
        number_found: How many things in the picture answer to its phrase.
        rival: Score of the surest of them that nobody was given; 0: all were.
    """

    instance: Instance | None
    number_found: int
    rival: float


@dataclass
class _Thing:
    """Something in the picture, as the first that found it showed it, and as each phrase did."""

    mask: np.ndarray
    found: dict[str, Instance] = field(default_factory=dict)


def assign(phrases: Sequence[str], found: Mapping[str, Sequence[Instance]]) -> list[Assigned]:
    """Give each subject a thing, so that the sum of scores is as large as can be.

    Phrases of different subjects may find the same things ("a red cat" finds a blue one, too): masks that cover each other by half of their
    union or more are one thing. Subjects of one phrase have theirs from left to right.

    Args:
        phrases: Of the subjects; several may have the same.
        found: All instances for each of these phrases.
    """
    things = _things({phrase: found[phrase] for phrase in phrases})
    scores = np.zeros((len(phrases), len(things)))
    for k, phrase in enumerate(phrases):
        for number, thing in enumerate(things):
            if phrase in thing.found:
                scores[k, number] = thing.found[phrase].score
    given: list[int | None] = [None] * len(phrases)
    for k, column in zip(*linear_sum_assignment(scores, maximize=True), strict=True):
        given[k] = int(column) if scores[k, column] > 0 else None
    for phrase in set(phrases):
        own = [k for k, other in enumerate(phrases) if other == phrase]
        columns = [column for column in (given[k] for k in own) if column is not None]
        ordered = sorted(columns, key=lambda column: mask_box(things[column].found[phrase].mask))
        for place, k in enumerate(own):
            given[k] = ordered[place] if place < len(ordered) else None
    return [
        _assigned(phrase, things, number, {other for other in given if other is not None})
        for phrase, number in zip(phrases, given, strict=True)
    ]


def _things(found: Mapping[str, Sequence[Instance]]) -> list[_Thing]:
    """What stands in the picture, the surest first; for each phrase the surest of its instances that show a thing."""
    flat = [(-one.score, phrase, number, one) for phrase, instances in found.items() for number, one in enumerate(instances)]
    things: list[_Thing] = []
    for _, phrase, _, instance in sorted(flat, key=lambda entry: entry[:3]):
        mask = instance.mask
        if mask.any():
            thing = next((other for other in things if overlap_of_masks(mask, other.mask) >= SAME_THING), None)
            if thing is None:
                thing = _Thing(mask)
                things.append(thing)
            thing.found.setdefault(phrase, instance)
    return things


def _assigned(phrase: str, things: Sequence[_Thing], number: int | None, taken: set[int]) -> Assigned:
    """What a subject was given, and what else answers to its phrase."""
    answering = {place: thing.found[phrase] for place, thing in enumerate(things) if phrase in thing.found}
    rivals = [one.score for place, one in answering.items() if place not in taken]
    return Assigned(None if number is None else answering[number], len(answering), max(rivals, default=0.0))
