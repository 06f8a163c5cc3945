"""A detector finds boxes by phrases, SAM 2 says what in them is the thing: what LangSAM does, which the paper uses."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from scipy.special import expit

from mosaic.evaluation.detection import Box, Detection, ScoringDetector, load_detector
from mosaic.evaluation.encoders import Provenance
from mosaic.evaluation.instances import places
from mosaic.evaluation.segmentation import Sam2Segmenter
from preprocess.construct.segmentation.protocol import Instance, confident


class DetectedSegmenter:
    """GroundingDINO, MM-GroundingDINO or OWLv2, then SAM 2."""

    def __init__(self, detector: str, segmenter: str, device: torch.device, dtype: torch.dtype, mask_threshold: float) -> None:
        """Load both.

        Raises:
            FileNotFoundError, ValueError: One cannot be had, is of another kind, or the detector gives no scores.
        """
        found = load_detector(detector, "segmentation.detector", device, dtype)
        if not isinstance(found, ScoringDetector):
            raise ValueError(f"segmentation.detector: {detector} must say how sure it is of a box, which {type(found).__name__} does not.")
        self.detector: ScoringDetector = found
        self.segmenter = Sam2Segmenter(segmenter, "segmentation.model", device, dtype)
        self.mask_threshold = mask_threshold
        self.provenance: dict[str, Provenance] = {"detector": self.detector.provenance, "segmenter": self.segmenter.provenance}

    def find(self, picture: Image.Image, phrases: Sequence[str]) -> list[list[Instance]]:
        """One instance for each box, with the box's score; the pixels' confidence is SAM 2's."""
        return [self._find(picture, phrase) for phrase in phrases]

    def _find(self, picture: Image.Image, phrase: str) -> list[Instance]:
        detections = once(inside(self.detector.detections(picture, phrase), picture))
        if not detections:
            return []
        logits = self.segmenter.logits(picture, [found.box for found in detections])
        shares = confident(expit(logits), self.mask_threshold)
        return [Instance(np.ascontiguousarray(share), found.score) for share, found in zip(shares, detections, strict=True)]


def inside(detections: Sequence[Detection], picture: Image.Image) -> list[Detection]:
    """Detections with their boxes cut at the picture's sides; those of which less than a pixel is left are gone."""
    kept = []
    for (left, top, right, bottom), score in detections:
        box = Box(max(left, 0.0), max(top, 0.0), min(right, float(picture.width)), min(bottom, float(picture.height)))
        if box.right - box.left >= 1 and box.bottom - box.top >= 1:
            kept.append(Detection(box, score))
    return kept


def once(detections: Sequence[Detection]) -> list[Detection]:
    """The first of the detections at each place, as a detector may find a thing several times."""
    numbers = places([found.box for found in detections])
    return [found for k, found in enumerate(detections) if numbers.index(numbers[k]) == k]
