"""Instances of a subject in a picture: found by name, cut out, on white; too small ones are left out."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from mosaic.evaluation.detection import Box, Detector
from mosaic.evaluation.encoders import Provenance
from mosaic.evaluation.entries import Entry
from mosaic.evaluation.segmentation import Segmenter
from mosaic.images import WHITE

MOST = 3  # instances of a name that count
FRACTION, LEAST = 20, 4  # of the picture's width and of that
SAME_PLACE = 0.5  # intersection over union from which two boxes hold the same thing


class Instance(NamedTuple):
    """Something that was found.

    Attributes:
        box: Where, in whole px.
        picture: What is there, white around it, on a white square.
    """

    box: Box
    picture: Image.Image


class InstanceFinder:
    """Finds instances as XVerse's script does: detector, segmenter, size filter, the first three."""

    def __init__(self, detector: Detector, segmenter: Segmenter) -> None:
        self.detector, self.segmenter = detector, segmenter
        self._case: Sequence[Entry] | None = None
        self._found: dict[tuple[int, str], list[Instance]] = {}

    def describe(self, encoder: Provenance) -> Provenance:
        """The provenance of what an encoder says of the instances; one change of model anywhere is another provenance."""
        makers = (self.detector.provenance, self.segmenter.provenance)
        found = "; ".join(f"{made.model} {made.revision} ({made.preprocessing})" for made in makers)
        return Provenance(encoder.model, encoder.revision, f"instances by {found}; white square; {encoder.preprocessing}")

    def find(self, case: Sequence[Entry], number: int, picture: Image.Image, name: str) -> list[Instance]:
        """Instances of a name in a case's picture of that number; those of the case are kept for the measures that follow."""
        if self._case is not case:
            self._case, self._found = case, {}
        if (number, name) not in self._found:
            self._found[number, name] = self._find(picture, name)
        return self._found[number, name]

    def _find(self, picture: Image.Image, name: str) -> list[Instance]:
        boxes = [box for box in (inside(one, picture) for one in self.detector.boxes(picture, name)) if is_large(box, picture.width)]
        boxes = boxes[:MOST]
        if not boxes:
            return []
        masks, pixels = self.segmenter.masks(picture, boxes), np.asarray(picture)
        return [Instance(box, cut_out(pixels, mask, box)) for box, mask in zip(boxes, masks, strict=True)]


def inside(box: Box, picture: Image.Image) -> Box:
    """A box in whole px, cut at the picture's sides."""
    left, top, right, bottom = (int(value) for value in box)
    return Box(max(left, 0), max(top, 0), min(right, picture.width), min(bottom, picture.height))


def is_large(box: Box, width: int) -> bool:
    """Whether a box is large enough in a picture of a width: with m = width // 20, it has at least m^2 px and no side below m // 4."""
    side, sides = width // FRACTION, (box.right - box.left, box.bottom - box.top)
    return min(sides) >= max(side // LEAST, 1) and sides[0] * sides[1] >= side**2


def cut_out(pixels: np.ndarray, mask: np.ndarray, box: Box) -> Image.Image:
    """The part of a picture [H, W, 3] in a box, white where a mask [H, W] says no, in the middle of a white square."""
    left, top, right, bottom = (int(value) for value in box)
    shown = np.where(mask[top:bottom, left:right, None], pixels[top:bottom, left:right], np.uint8(WHITE[0]))
    height, width = shown.shape[:2]
    side = max(width, height)
    square = Image.new("RGB", (side, side), WHITE)
    square.paste(Image.fromarray(shown), ((side - width) // 2, (side - height) // 2))
    return square


def places(boxes: Sequence[Box]) -> list[int]:
    """Numbers of the places of boxes: one overlapping an earlier place's first box by half of their union or more is at that place."""
    firsts: list[Box] = []
    found = []
    for box in boxes:
        number = next((k for k, first in enumerate(firsts) if overlap(box, first) >= SAME_PLACE), len(firsts))
        if number == len(firsts):
            firsts.append(box)
        found.append(number)
    return found


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(one.right, other.right) - max(one.left, other.left)
    height = min(one.bottom, other.bottom) - max(one.top, other.top)
    both = max(width, 0) * max(height, 0)
    union = sum((box.right - box.left) * (box.bottom - box.top) for box in (one, other)) - both
    return both / union if union else 0.0
