"""Stage 3: each subject is found in the picture, none twice, and gets a mask that no other shares."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mosaic.evaluation.detection import Box
from mosaic.evaluation.instances import overlap
from preprocess.construct.candidates import Candidate, picture_name, read_stage_picture
from preprocess.construct.rows import Found, Row, SegmentationRow, Subject
from preprocess.construct.segmentation.assignment import assign
from preprocess.construct.segmentation.masks import exclusive, mask_box, truncated
from preprocess.construct.segmentation.protocol import PhraseSegmenter
from preprocess.construct.segmentation.settings import SegmentationSettings
from preprocess.construct.stage import Stage

NOT_FOUND = "not_found"


def segmentation_stage(settings: SegmentationSettings, seed: int, dtype: torch.dtype) -> Stage:
    """The stage.

    Args:
        settings: Its section.
        seed: Of the run; nothing is drawn here.
        dtype: Of the models.
    """
    del seed
    return Stage(
        name="segmentation",
        row=SegmentationRow,
        settings=settings,
        load=lambda device: SegmentationWorker(settings, load_segmenter(settings, device, dtype)),
        reasons=partial(reasons, settings),
    )


def load_segmenter(settings: SegmentationSettings, device: torch.device, dtype: torch.dtype) -> PhraseSegmenter:
    """Load the models that a section names.

    Raises:
        FileNotFoundError, ValueError: One cannot be had, or is of another kind.
    """
    if settings.kind == "sam3":
        from preprocess.construct.segmentation.sam3 import Sam3Segmenter

        return Sam3Segmenter(settings.model, device, dtype, settings.mask_threshold)
    if settings.kind == "clipseg":
        from preprocess.construct.segmentation.clipseg import ClipSegSegmenter

        return ClipSegSegmenter(settings.model, device, dtype, settings.mask_threshold)
    from preprocess.construct.segmentation.detected import DetectedSegmenter

    assert settings.detector is not None, "the section asks for one"
    return DetectedSegmenter(settings.detector, settings.model, device, dtype, settings.mask_threshold)


def reasons(settings: SegmentationSettings, candidate: Candidate) -> list[str]:
    """The limits that some subject misses, in their order."""
    assert candidate.segmentation is not None
    limits, missed = settings.limits, set()
    for found in candidate.segmentation.subjects:
        if found is None:
            missed.add(NOT_FOUND)
            continue
        for name, limit in limits:
            if limit is not None:
                bound, _, measure = name.partition("_")
                value = getattr(found, measure)
                if value < limit if bound == "min" else value > limit:
                    missed.add(name)
    return [name for name in (NOT_FOUND, *type(limits).model_fields) if name in missed]


class SegmentationWorker:
    """The models, loaded."""

    def __init__(self, settings: SegmentationSettings, segmenter: PhraseSegmenter) -> None:
        self.settings, self.segmenter = settings, segmenter
        self.provenance: dict[str, Any] = {name: asdict(provenance) for name, provenance in segmenter.provenance.items()}

    def __call__(self, candidates: Sequence[Candidate], folder: Path) -> Iterator[Row]:
        """Candidate after candidate: what is found in one depends on nothing else."""
        for candidate in candidates:
            picture = read_stage_picture(candidate, "synthesis").convert("RGB")
            found = find_subjects(self.segmenter, picture, [self._text(subject) for subject in candidate.prompt.subjects])
            for k, one in enumerate(found):
                if one is not None:
                    Image.fromarray(one[1].astype(np.uint8) * np.uint8(255)).save(folder / picture_name(candidate.number, f"mask{k}"))
            yield SegmentationRow(number=candidate.number, subjects=tuple(None if one is None else one[0] for one in found))

    def _text(self, subject: Subject) -> str:
        return subject.phrase if self.settings.text == "phrase" else subject.name


def find_subjects(segmenter: PhraseSegmenter, picture: Image.Image, texts: Sequence[str]) -> list[tuple[Found, np.ndarray] | None]:
    """Find each subject of a picture.

    Args:
        segmenter: Finds by phrases.
        picture: RGB.
        texts: What is asked for, for each subject; several may have the same.

    Returns:
        For each subject what is known of it and its mask, bool `[H, W]`, of which no two share a pixel; None: it was not found, or others
        have all of its pixels.
    """
    asked = list(dict.fromkeys(texts))
    assigned = assign(texts, dict(zip(asked, segmenter.find(picture, asked), strict=True)))
    standing = [k for k, one in enumerate(assigned) if one.instance is not None]
    parted = exclusive([one.instance for one in assigned if one.instance is not None])
    masks = {k: mask for k, mask in zip(standing, parted, strict=True) if mask.any()}
    boxes = {k: mask_box(mask) for k, mask in masks.items()}
    found: list[tuple[Found, np.ndarray] | None] = []
    for k, one in enumerate(assigned):
        if k not in masks or one.instance is None:
            found.append(None)
            continue
        known = Found(
            box=(boxes[k].left, boxes[k].top, boxes[k].right, boxes[k].bottom),
            score=one.instance.score,
            number_found=one.number_found,
            area=float(masks[k].mean()),
            truncated=truncated(masks[k]),
            overlap=largest_overlap(boxes[k], [box for other, box in boxes.items() if other != k]),
            rival=one.rival,
        )
        found.append((known, masks[k]))
    return found


def largest_overlap(box: Box, others: Sequence[Box]) -> float:
    """Largest intersection over union of a box with others; 0: there are none."""
    return max((overlap(box, other) for other in others), default=0.0)
